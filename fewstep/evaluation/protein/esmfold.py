"""ESMFold (Lin et al., Science 2023) as the fold function of `designability`, through transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...models.folder import refuse_pickles
from .geometry import Coords

CA = 1  # place of the CA atom among a residue's 14


def esmfold(folder: str | Path, device: str | None = None) -> Callable[[str], Coords]:
    """A function from a sequence to CA atoms [n, 3] in Angstrom, from local weights; nothing is fetched.

    folder: a `transformers` folder of EsmForProteinFolding (facebook/esmfold_v1 converted to safetensors: pickles are not
    loaded). device: default a GPU where there is one.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"'{folder}' is no ESMFold folder: give a local one with config.json and safetensors")
    refuse_pickles(folder)
    from transformers import EsmForProteinFolding

    model: Any = EsmForProteinFolding.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return folding(model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")))


def folding(model: Any) -> Callable[[str], Coords]:
    """The function of a loaded model: positions after its last block, of which the CA atoms are taken."""

    @torch.no_grad()
    def fold(sequence: str) -> Coords:
        positions = model.infer(sequence)["positions"]  # [blocks, 1, n, 14, 3]
        return positions[-1, 0, :, CA].double().cpu().numpy()

    return fold
