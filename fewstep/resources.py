"""Where the configs and assets that travel with fewstep lie: in the repository, or inside an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent


def asset(name: str) -> Path:
    """Path of a shipped asset, e.g. `asset("digits/digits.safetensors")`."""
    return _ROOT / "assets" / name


def config(name: str) -> Path:
    """Path of a shipped recipe, e.g. `config("decoupled_dmd/digits.yaml")`."""
    return _ROOT / "configs" / name


def locate(source: str | Path) -> Path:
    """A local path; `shipped:NAME` is the asset NAME, e.g. "shipped:teachers/digits"."""
    text = str(source)
    return asset(text.removeprefix("shipped:")) if text.startswith("shipped:") else Path(text)
