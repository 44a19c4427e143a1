"""Protein backbones as training data: CA coordinates in nanometres, and lengths alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..errors import UserError
from ..resources import asset
from .batch import Cond
from .source import Source, SourceConfig, digest
from .structures import Chain, list_structures, read_chains

if TYPE_CHECKING:
    from ..draws import Draw

MULTIPLE = 8  # padded lengths are multiples of it


class Bounds(SourceConfig):
    """Residues of a chain, at least and at most."""

    shortest: int = Field(default=50, ge=4, description="residues; shorter chains are left out")
    longest: int = Field(default=256, ge=4, description="longer chains are cropped to it")

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if self.shortest > self.longest:
            raise ValueError(f"shortest={self.shortest} is above longest={self.longest}")
        return self


class LengthsConfig(Bounds):
    """`{source: lengths, shortest: 50, longest: 256}`."""

    count: int = Field(default=50_000, gt=0, description="samples in one pass")


class Lengths(Source):
    """Lengths alone, for methods whose student makes its own chains: every length of the range equally often."""

    Config = LengthsConfig

    def __len__(self) -> int:
        return self.config.count

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`cond.mask` [n, residues], padded to one length for all rows."""
        span = self.config.longest - self.config.shortest + 1
        lengths = self.config.shortest + torch.as_tensor(ids) % span
        return {"cond": Cond(mask=masks(lengths, padded(self.config.longest)))}

    def content_key(self) -> str:
        """Digest of the three numbers."""
        return digest(f"lengths {self.config.shortest} {self.config.longest} {self.config.count}")


class ChainsConfig(Bounds):
    """`{source: chains, path: FOLDER}` of PDB and mmCIF files; without `path` the shipped real chains."""

    path: str | None = Field(default=None, description="folder with structure files; null: the shipped chains")
    whole: bool = Field(default=False, description="leave longer chains out instead of cropping them")


class Chains(Source):
    """Unbroken chains. `x0` [n, residues, 3] nanometres, centred, 0 in padding; `cond.mask`.

    With a draw a longer chain is cropped at a random place and each chain is turned at random, which is how a network
    that is not equivariant learns that directions mean nothing.
    """

    Config = ChainsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        found = read_folder(Path(self.config.path)) if self.config.path else shipped()
        most = self.config.longest if self.config.whole else np.inf
        self.chains = [c for c in found if self.config.shortest <= len(c.x) <= most]
        if not self.chains:
            raise UserError(
                f"no unbroken chain of {self.config.shortest} to {most:g} residues among {len(found)}: change shortest "
                "and longest"
            )

    def __len__(self) -> int:
        return len(self.chains)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """Rows padded to `longest`; draw None: no rotation, crops from the first residue."""
        n, most = len(ids), padded(self.config.longest)
        x = torch.zeros(n, most, 3)
        where = draw.uniform("crop") if draw is not None else torch.zeros(n)
        lengths = torch.zeros(n, dtype=torch.long)
        for row, i in enumerate(torch.as_tensor(ids).tolist()):
            piece = self._crop(self.chains[i], float(where[row]))
            x[row, : len(piece)], lengths[row] = piece - piece.mean(0), len(piece)
        if draw is not None:
            x = x @ rotations(draw.normal("rotation", 4))
        return {"x0": x, "cond": Cond(mask=masks(lengths, most))}

    def _crop(self, chain: Chain, where: float) -> Tensor:
        spare = max(0, len(chain.x) - self.config.longest)
        start = min(int(where * (spare + 1)), spare)
        return torch.from_numpy(chain.x[start : start + self.config.longest]) / 10

    def content_key(self) -> str:
        """Digest of coordinates and bounds."""
        said = f"{self.config.shortest} {self.config.longest} {self.config.whole}"
        return digest(said, *(c.x.tobytes() for c in self.chains))


def read_folder(folder: Path) -> list[Chain]:
    """Unbroken pieces of all chains in the structure files of a folder.

    Files that cannot be read or hold no protein are left out with a warning; UserError when no file is left.
    """
    if not folder.is_dir():
        raise UserError(f"no folder '{folder}': set `path` to a folder of PDB or mmCIF files")
    files, chains, bad = list_structures(folder), [], []
    for file in files:
        try:
            chains += [piece for chain in read_chains(file) for piece in chain.pieces()]
        except UserError as error:
            bad.append(str(error))
    if len(bad) == len(files):
        raise UserError(bad[0])
    if bad:
        warnings.warn(f"chains: left out {len(bad)} of {len(files)} files, the first because {bad[0]}", stacklevel=2)
    return chains


def shipped() -> list[Chain]:
    """The real chains in assets: see the note beside them."""
    from safetensors.numpy import load_file

    folder = asset("chains")
    stored = load_file(folder / "chains.safetensors")
    names = (folder / "names.txt").read_text().split()
    parts = np.split(stored["ca"].astype(np.float32) / 100, np.cumsum(stored["lengths"])[:-1])
    return [Chain(name, np.asarray(part, np.float32)) for name, part in zip(names, parts)]


def padded(length: int) -> int:
    """The next multiple of 8."""
    return -(-length // MULTIPLE) * MULTIPLE


def masks(lengths: Tensor, most: int) -> Tensor:
    """[n, most], true for the first lengths[i] of row i."""
    return torch.arange(most)[None] < lengths[:, None]


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices [n, 3, 3] of quaternions [n, 4] of any length; of normal ones uniform over all rotations."""
    a, b, c, d = (quaternions / quaternions.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)
