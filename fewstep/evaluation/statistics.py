"""Means and covariances of features on disk, so that a reference set is run through the network once.

NAME.safetensors   mean [d], covariance [d, d] in float64; the header says feature network, sha256 of its weights,
                   resize chain and number of images, and all four are held against the network that is in use
NAME.npz           `mu`, `sigma`, as pytorch-fid and clean-fid write them: says nothing of its origin
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .features import FeatureNetwork
from .fid import Moments

FORMAT = 1
SUFFIXES = (".safetensors", ".npz")


@dataclass(frozen=True)
class Statistics:
    """mean [d], covariance [d, d], float64, of the features of n images; the other fields are None when unknown.

    features, sha256, resize: the network's name, hash of its weights, resize chain.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None = None
    features: str | None = None
    sha256: str | None = None
    resize: str | None = None

    @classmethod
    def of(cls, moments: Moments, network: FeatureNetwork) -> Statistics:
        """What `network` gave."""
        return cls(moments.mean, moments.covariance, moments.count, network.name, network.sha256, network.resize)

    def fit(self, network: FeatureNetwork) -> None:
        """UserError when they are of another network, other weights or another resize chain than `network`."""
        here = {"features": network.name, "resize": network.resize, "sha256": network.sha256}
        for field, value in here.items():
            said = getattr(self, field)
            if said is not None and said != value:
                raise UserError(
                    f"the statistics' {field} is '{said}', that of the network '{value}': "
                    f"choose `features: {self.features}`, or make the statistics anew"
                )

    @property
    def words(self) -> str:
        """Name for a protocol: what the numbers are, not where they lie."""
        digest = hashlib.sha256(self.mean.numpy().tobytes() + self.covariance.numpy().tobytes()).hexdigest()
        return f"statistics n={'unknown' if self.n is None else self.n} sha256={digest[:16]}"


def write_statistics(statistics: Statistics, file: Path) -> None:
    """Writes .safetensors or .npz, in one move. UserError for another suffix, or when a header would have gaps."""
    from safetensors.torch import save_file

    _suffix(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".aside-{file.name}")
    mean, covariance = statistics.mean.contiguous(), statistics.covariance.contiguous()
    if file.suffix == ".npz":
        np.savez(aside, mu=mean.numpy(), sigma=covariance.numpy())
    else:
        said = {name: getattr(statistics, name) for name in ("n", "features", "sha256", "resize")}
        if None in said.values():
            raise UserError(f"'{file.name}': statistics of unknown origin are written as .npz only")
        about = {"about": json.dumps({"format": FORMAT, **said})}
        save_file({"mean": mean, "covariance": covariance}, aside, metadata=about)
    os.replace(aside, file)


def read_statistics(file: Path, network: FeatureNetwork | None = None) -> Statistics:
    """The statistics in `file`, held against `network` when it is given.

    UserError when there are none, they are damaged, or they are not of that network.
    """
    _suffix(file)
    if not file.is_file():
        raise UserError(f"no statistics '{file}': write them first, or give a folder of images as reference")
    found = _read_npz(file) if file.suffix == ".npz" else _read_safetensors(file)
    _check(found, file)
    if network is not None:
        found.fit(network)
    return found


def _read_npz(file: Path) -> Statistics:
    try:
        with np.load(file, allow_pickle=False) as held:
            mean, covariance = (torch.from_numpy(np.asarray(held[name], dtype=np.float64)) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{file}' holds no `mu` and `sigma`: {error}: write it anew") from None
    return Statistics(mean, covariance)


def _read_safetensors(file: Path) -> Statistics:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            said = json.loads(opened.metadata()["about"])
            if said.pop("format") != FORMAT:
                raise UserError(f"'{file}' was written by a newer fewstep: update fewstep")
            return Statistics(opened.get_tensor("mean"), opened.get_tensor("covariance"), **said)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"'{file}' holds no statistics of fewstep: {error}: write it anew") from None


def _check(found: Statistics, file: Path) -> None:
    mean, covariance = found.mean, found.covariance
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise UserError(f"'{file}': a mean [d] and a covariance [d, d] are wanted, not {shapes}: write it anew")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"'{file}' holds numbers that are not finite: write it anew")
    if not torch.allclose(covariance, covariance.T, rtol=1e-6, atol=1e-9 * covariance.diagonal().abs().max().item()):
        raise UserError(f"'{file}': its covariance is not symmetric: write it anew")


def _suffix(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise UserError(f"'{file.name}': statistics are {' or '.join(SUFFIXES)}: name the file so")
