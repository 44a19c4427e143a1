"""`python -m fewstep ...`, and so `accelerate launch -m fewstep ...`: the same as the command `fewstep ...`."""

from __future__ import annotations

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
