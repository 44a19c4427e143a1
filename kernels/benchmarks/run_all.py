"""All benchmarks of kernels on the card at hand, each in a process of its own: `python kernels/benchmarks/run_all.py [FOLDER]`.

Writes FOLDER/attention.csv, FOLDER/attention_errors.csv and FOLDER/distillation.csv (FOLDER: ./benchmarks). Without
CUDA the CPU is measured, and the errors are those of `chunked`, or with TRITON_INTERPRET=1 of the interpreted kernels too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

SCRIPTS = ("attention_errors.py", "attention.py", "distillation.py")


def main() -> None:
    """Runs the scripts in turn; the exit status is that of the first that fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("folder", nargs="?", default="benchmarks", type=Path)
    folder = said.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for script in SCRIPTS:
        file = folder / f"{Path(script).stem}.csv"
        print(f"{script} on {device} -> {file}", flush=True)
        subprocess.run(
            [sys.executable, str(Path(__file__).with_name(script)), "--device", device, "--csv", str(file)], check=True
        )


if __name__ == "__main__":
    main()
