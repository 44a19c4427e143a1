"""Sampling a protein folder: chains that depend on the seed and their own index, not on the batch or its padding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..draws import Draw
from ..errors import UserError, nearest
from ..evaluation.nfe import count_calls
from .fresh import chains_of, given_noise
from .network import network_of, takes_lengths
from .pipeline import addresses, load_pipeline

ANGSTROM = 10.0  # in a nanometre
USUAL = 100  # residues
PAIR_FLOATS = 2**26  # that one layer's pairs of a batch may hold


@dataclass(frozen=True)
class GeneratedChains:
    """What `generate_chains` gives back.

    chains: CA coordinates [residues, 3] in Angstrom, float32. lengths: residues of each.
    nfe: network evaluations a chain, counted. timesteps: noise levels t that the network was called at.
    noise_scale: factor of the sampler's noise: of its standard deviation in few steps, of its variance in the teacher's
    sampler.
    """

    chains: list[NDArray[np.float32]]
    lengths: list[int]
    nfe: float
    ms_per_chain: float
    timesteps: tuple[float, ...]
    scheduler: str
    noise_scale: float


def generate_chains(
    source: str | Path | Any,
    n: int,
    seed: int = 0,
    lengths: Sequence[int] = (100,),
    steps: int | None = None,
    noise_scale: float | None = None,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
    guidance: float | None = None,
    cath: Sequence[int] | Sequence[Sequence[int]] | None = None,
) -> GeneratedChains:
    """n backbones of a folder or a loaded pipeline. Chain i is made of noise (seed, i), whatever is made beside it.

    lengths: residues; chain i has number i modulo their count. steps, noise_scale, guidance: default what the folder
    says. batch: chains at a time, default as many as fit (fewer of long ones). progress(done, n) after each batch.
    cath: fold labels (C, A, T), one for all or one a chain; 0 = not known.
    Raises UserError for a broken folder, one that makes no chains, and lengths, steps or labels that do not fit.
    """
    if n < 1 or (batch is not None and batch < 1):
        raise UserError(f"n and batch must be at least 1, not {n} and {batch}")
    pipeline = load_pipeline(source, trust_remote_code) if isinstance(source, str | Path) else source
    if not takes_lengths(pipeline):
        raise UserError(f"{type(pipeline).__name__} makes images: chains of given lengths need a protein model")
    sizes, folds = _lengths(n, lengths), _folds(n, cath)
    said = {"noise_scale": noise_scale, "guidance_scale": guidance}
    chains: dict[int, NDArray[np.float32]] = {}
    seconds = 0.0
    with count_calls(network_of(pipeline)) as calls:
        for rows in _batches(pipeline, sizes, batch):
            fold = None if folds is None else folds[torch.from_numpy(rows)]
            began = time.perf_counter()
            made = _coordinates(pipeline, Draw.for_images(seed, rows), sizes[rows], steps, cath=fold, **said)
            seconds += time.perf_counter() - began
            chains |= {int(i): x[: sizes[i]] for i, x in zip(rows, made)}
            if progress is not None:
                progress(len(chains), n)
    scheduler = pipeline.scheduler
    return GeneratedChains(
        chains=[chains[i] for i in range(n)],
        lengths=sizes.tolist(),
        nfe=calls.per_image(n),
        ms_per_chain=1000 * seconds / n,
        timesteps=tuple(scheduler.timesteps.tolist()),
        scheduler=type(scheduler).__name__,
        noise_scale=float(scheduler.config["noise_scale"] if noise_scale is None else noise_scale),
    )


def save_chains(made: GeneratedChains, folder: str | Path, file_format: str = "pdb") -> list[Path]:
    """Writes each chain into a file folder/000000.pdb (or .cif) and so on; every residue is called ALA.

    UserError for another format, a chain that holds NaN or does not fit into the format, and a folder that is a file.
    """
    from fewstep_pipelines import write_chains

    try:
        return write_chains(made.chains, folder, file_format)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"cannot write into '{folder}': {error.strerror}") from error


def check_format(file_format: str) -> None:
    """UserError for a kind of file that `save_chains` does not write."""
    from fewstep_pipelines.pipeline_fewstep_protein_v1 import FORMATS

    if file_format not in FORMATS:
        raise UserError(f"no chains are written as '{file_format}': {nearest(file_format, FORMATS)}")


def usual_length(pipeline: Any) -> int:
    """100 residues, or the nearest length that the model makes."""
    config: Any = network_of(pipeline).config
    return min(max(USUAL, config.get("shortest") or 1), config.get("longest") or USUAL)


def _lengths(n: int, lengths: Sequence[int]) -> NDArray[np.int64]:
    """[n], the given ones round and round."""
    if not lengths:
        raise UserError("no lengths: say how many residues, e.g. 100")
    return np.array([int(lengths[i % len(lengths)]) for i in range(n)], np.int64)


def _folds(n: int, cath: Sequence[int] | Sequence[Sequence[int]] | None) -> torch.Tensor | None:
    """[n, 3]"""
    if cath is None:
        return None
    labels = torch.as_tensor(cath, dtype=torch.int64)
    if labels.shape not in ((3,), (n, 3)):
        raise UserError(f"cath must be three labels (C, A, T), or three for each of {n} chains")
    return labels.expand(n, 3)


def _batches(pipeline: Any, sizes: NDArray[np.int64], batch: int | None) -> Iterator[NDArray[np.int64]]:
    """Indices of chains made together: of like lengths, so that little is padded; the longest first."""
    order = np.argsort(-sizes, kind="stable")
    width = network_of(pipeline).config.get("pair_width", 1)  # type: ignore[union-attr, operator]
    start = 0
    while start < len(order):
        longest = max(int(sizes[order[start]]), 1)
        most = batch or max(1, PAIR_FLOATS // (width * longest**2))
        yield order[start : start + most]
        start += most


def _coordinates(pipeline: Any, draw: Draw, lengths: NDArray[np.int64], steps: int | None, **options: Any) -> NDArray:
    """[rows, residues, 3] in Angstrom."""
    try:
        with given_noise(pipeline, addresses(draw)):
            found = chains_of(pipeline, lengths.tolist(), steps, **options)
    except ValueError as error:  # lengths, steps, labels or a guidance that the pipeline or its scheduler cannot do
        raise UserError(str(error).strip().splitlines()[0]) from error
    return ANGSTROM * found.cpu().numpy()
