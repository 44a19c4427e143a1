"""Protein backbones as training data: CA coordinates in nanometres, and lengths alone."""

from __future__ import annotations

import re
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
from .folds import Folds, known_folds, read_table
from .source import Source, SourceConfig, digest
from .structures import Chain, list_structures, read_chains

if TYPE_CHECKING:
    from ..draws import Draw

MULTIPLE = 8  # padded lengths are multiples of it


class Bounds(SourceConfig):
    """Residues of a chain, at least and at most; which stand together in a batch; and the folds that are counted."""

    shortest: int = Field(default=50, ge=4, description="residues; shorter chains are left out")
    longest: int = Field(default=256, ge=4, description="longer chains are cropped to it")
    bucket: int | None = Field(
        default=None, gt=0, description="batches hold lengths that round up to one multiple of it"
    )
    folds: str | None = Field(default=None, description="file of the CATH codes that are counted, one a line")

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if self.shortest > self.longest:
            raise ValueError(f"shortest={self.shortest} is above longest={self.longest}")
        return self


class LengthsConfig(Bounds):
    """`{source: lengths, shortest: 50, longest: 256}`."""

    count: int = Field(default=50_000, gt=0, description="samples in one pass")
    pairs: str | None = Field(default=None, description="CSV file with the columns length and cath, drawn from in turn")


class Lengths(Source):
    """Lengths alone, for methods whose student makes its own chains: every length of the range equally often.

    With `pairs` lengths and folds are those of a table, of which rows outside the bounds are left out.
    """

    Config = LengthsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.folds: Folds | None = None
        self.lengths = torch.arange(self.config.shortest, self.config.longest + 1)
        if self.config.pairs is not None:
            self.lengths, self.folds, self.cath = self._table(self.config.pairs)
        self.buckets = _buckets(self._length(torch.arange(len(self))), self.config.bucket)

    def __len__(self) -> int:
        return self.config.count

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """`cond.mask` [n, residues], padded to the longest of the rows; with `pairs` also `cond.cath` [n, 3]."""
        ids = torch.as_tensor(ids)
        cond = Cond(mask=masks(self._length(ids)))
        return {"cond": cond if self.folds is None else cond.with_(cath=self.cath[ids % len(self.cath)])}

    def heaviest(self, rows: int) -> Tensor:
        """The longest."""
        return torch.full((rows,), int(self.lengths.argmax()))

    def content_key(self) -> str:
        """Digest of the numbers."""
        said = f"lengths {self.config.shortest} {self.config.longest} {self.config.count}"
        return digest(said) if self.folds is None else digest(said, self.lengths.numpy().tobytes(), *self.folds.codes)

    def _length(self, ids: Tensor) -> Tensor:
        return self.lengths[ids % len(self.lengths)]

    def _table(self, file: str) -> tuple[Tensor, Folds, Tensor]:
        rows = read_table(file, "length")
        odd = [length for length, _ in rows if not length.isdigit()]
        if odd:
            raise UserError(f"'{file}' has the length '{odd[0]}': write a whole number of residues")
        kept = [(int(n), code) for n, code in rows if self.config.shortest <= int(n) <= self.config.longest]
        if not kept:
            raise UserError(f"'{file}' has no length of {self.config.shortest} to {self.config.longest} residues")
        folds = known_folds(self.config.folds, (code for _, code in rows))
        return torch.tensor([n for n, _ in kept]), folds, folds.labels([code for _, code in kept])


class ChainsConfig(Bounds):
    """`{source: chains, path: FOLDER}` of PDB and mmCIF files; without `path` the shipped real chains."""

    path: str | None = Field(default=None, description="folder with structure files; null: the shipped chains")
    whole: bool = Field(default=False, description="leave longer chains out instead of cropping them")
    labels: str | None = Field(default=None, description="CSV file with the columns name (FILE or FILE_CHAIN) and cath")


class Chains(Source):
    """Unbroken chains. `x0` [n, residues, 3] nanometres, centred, 0 in padding; `cond.mask`; with `labels` `cond.cath`.

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
        self.folds: Folds | None = None
        if self.config.labels is not None:
            self.folds, self.cath = self._labelled(self.config.labels)
        lengths = torch.tensor([len(c.x) for c in self.chains]).clamp(max=self.config.longest)
        self.buckets = _buckets(lengths, self.config.bucket)

    def __len__(self) -> int:
        return len(self.chains)

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """Rows padded to the longest of them; draw None: no rotation, crops from the first residue."""
        ids = torch.as_tensor(ids)
        where = draw.uniform("crop") if draw is not None else torch.zeros(len(ids))
        pieces = [self._crop(self.chains[i], float(at)) for i, at in zip(ids.tolist(), where)]
        mask = masks(torch.tensor([len(piece) for piece in pieces]))
        x = torch.zeros(*mask.shape, 3)
        for row, piece in zip(x, pieces):
            row[: len(piece)] = piece - piece.mean(0)
        if draw is not None:
            turn = rotations(draw.normal("rotation", 4))[:, :, None]
            parts = [x[..., [axis]] * turn[:, axis] for axis in range(3)]
            x = parts[0] + parts[1] + parts[2]  # unlike @ the same in every batch, bit for bit
        cond = Cond(mask=mask)
        return {"x0": x, "cond": cond if self.folds is None else cond.with_(cath=self.cath[ids])}

    def heaviest(self, rows: int) -> Tensor:
        """The longest."""
        order = sorted(range(len(self.chains)), key=lambda i: -len(self.chains[i].x))
        return torch.tensor([order[i % len(order)] for i in range(rows)])

    def _labelled(self, file: str) -> tuple[Folds, Tensor]:
        """Folds, and those of the chains [chains, 3]; a chain is named itself, as the whole it is a piece of, or by its file."""
        codes = dict(read_table(file, "name"))
        found = [next((codes[name] for name in _names(chain.name) if name in codes), "") for chain in self.chains]
        if not any(found):
            raise UserError(f"'{file}' names none of the chains, e.g. {self.chains[0].name}")
        folds = known_folds(self.config.folds, codes.values())
        return folds, folds.labels(found)

    def _crop(self, chain: Chain, where: float) -> Tensor:
        spare = max(0, len(chain.x) - self.config.longest)
        start = min(int(where * (spare + 1)), spare)
        return torch.from_numpy(chain.x[start : start + self.config.longest]) / 10

    def content_key(self) -> str:
        """Digest of coordinates and bounds."""
        said = f"{self.config.shortest} {self.config.longest} {self.config.whole}"
        codes = () if self.folds is None else self.folds.codes
        told = b"" if self.folds is None else self.cath.numpy().tobytes()
        return digest(said, *(c.x.tobytes() for c in self.chains), told, *codes)


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


def masks(lengths: Tensor, most: int | None = None) -> Tensor:
    """[n, most], true for the first lengths[i] of row i; by itself the longest of them, to the next multiple of 8."""
    return torch.arange(padded(int(lengths.max())) if most is None else most)[None] < lengths[:, None]


def _names(chain: str) -> tuple[str, str, str]:
    whole = re.sub(r"\.\d+$", "", chain)
    return chain, whole, whole.rsplit("_", 1)[0]


def _buckets(lengths: Tensor, multiple: int | None) -> Tensor | None:
    return None if multiple is None else -(-lengths // multiple)


def rotations(quaternions: Tensor) -> Tensor:
    """Rotation matrices [n, 3, 3] of quaternions [n, 4] of any length; of normal ones uniform over all rotations."""
    a, b, c, d = (quaternions / quaternions.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        [1 - 2 * (c * c + d * d), 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), 1 - 2 * (b * b + d * d), 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), 1 - 2 * (b * b + c * c)],
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)
