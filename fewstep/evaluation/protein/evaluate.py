"""Scores a protein model, or a folder of structures: `fewstep evaluate X` for whatever holds chains.

<out>/structures/000000.pdb   what a model made; chain i is a function of (seed, i)
<out>/chains.jsonl            a line a chain: how it was made, and its own numbers
<out>/metrics.json            values with their protocols
<out>/chains.html             all of it to look at
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..manifest import METRICS_FILE, Protocol, Score, write_scores
from .designability import SEQUENCES, TEMPERATURE, WITHIN, Judges, designability
from .files import STRUCTURES, Made, Maker, Reference, holds_chains, load_reference, make, read, write_chain
from .geometry import Coords
from .page import write_page
from .scores import ALIGNED, MOST_COMPARED, Described, described, scores_of

VERSION = "1"  # raised when a value would change
CHAINS_FILE, PAGE = "chains.jsonl", "chains.html"
DEFAULT_N, DEFAULT_LENGTHS = 100, (100,)
AGAINST = ("novelty", "energy", "w1_")  # beginnings of values that compare with a reference
BY_BIOTITE = ("helix", "strand", "w1_helix", "w1_strand", "energy")


def evaluate_chains(
    model: str | Path,
    n: int | None = None,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    reference: str | Path | Reference | None = None,
    seed: int = 0,
    steps: int | None = None,
    noise_scale: float | None = None,
    batch: int | None = None,
    out: str | Path | None = None,
    compared: int = MOST_COMPARED,
    maker: Maker | None = None,
    judges: Judges | None = None,
) -> dict[str, Any]:
    """Scores `model`, an exported protein model (n chains are made) or a folder of structure files (n None: all of them).

    n: default 100 of a model. lengths: residues, round and round over the chains. reference: a folder of structure files,
    or "chains" for the shipped real ones; adds novelty, `w1_*` and `energy`. steps, noise_scale: default the model's own.
    compared: chains that are aligned with each other. maker: in place of `exporting.chains.generate_chains`.
    judges: who design and fold; adds `designable`, the share of chains for which some sequence folds back within 2 A.

    Returns `model, n, lengths, seed`, how the chains were made (`nfe, ms_per_chain, steps, timesteps, scheduler,
    noise_scale, seconds_per_100, effective_seconds`), `values` and `scores` (each value with its protocol).
    """
    folder = Path(model)
    real = load_reference(reference) if not isinstance(reference, Reference) else reference
    if holds_chains(folder) and (folder / "model_index.json").exists():
        options = {"seed": seed, "steps": steps, "noise_scale": noise_scale, "batch": batch}
        made = make(folder, n or DEFAULT_N, lengths, maker, **options)
    else:
        made = read(folder, n)
    found = [described(x) for x in made.chains]
    values = scores_of(found, real.chains if real else (), compared)
    if judges is not None:
        values["designable"] = designability(made.chains, judges.design, judges.fold).share
    told = [(value, _protocol(name, made, real, compared)) for name, value in values.items()]
    scores = [Score(value, _judged(p, judges) if p.metric == "designable" else p) for value, p in told]
    facts = {**made.facts, **_times(made, values.get("designable", values["valid"]))}
    if out is not None:
        _write(made, found, scores, Path(out), {"seed": seed, **facts}, real)
    return {
        "model": str(folder),
        "n": len(made.chains),
        "lengths": made.lengths,
        "seed": seed,
        **facts,
        "values": values,
        "scores": [s.plain() for s in scores],
    }


def effective_time(seconds: float, samples: int, share: float) -> float:
    """Seconds for each sample that is any good: seconds / (samples x share); infinite when none is."""
    return seconds / (samples * share) if share > 0 else math.inf


def _times(made: Made, valid: float) -> dict[str, float]:
    if not made.facts:
        return {}
    each = made.facts["ms_per_chain"] / 1000
    return {"seconds_per_100": 100 * each, "effective_seconds": effective_time(each, 1, valid)}


def _protocol(name: str, made: Made, real: Reference | None, compared: int) -> Protocol:
    """What a value was read with: CA atoms alone, P-SEA letters, or alignments; and of what lengths."""
    tool = "biotite" if name in BY_BIOTITE else "tmtools" if name in ALIGNED else None
    installed = _version(tool) if tool else None
    against = real.name if real is not None and name.startswith(AGAINST) else "none"
    aligned = f"at most {compared} aligned" if name in ALIGNED else "none"
    return Protocol(
        metric=name,
        n=len(made.chains),
        impl=f"fewstep + {tool}" if installed else "fewstep",
        impl_version=f"{VERSION} + {installed}" if installed else VERSION,
        features="ca",
        weights_sha256="none",
        resize=aligned,
        reference=f"{against}, lengths {made.lengths}",
    )


def _judged(protocol: Protocol, judges: Judges | None) -> Protocol:
    name = judges.name if judges is not None else "none"
    return replace(protocol, features=name, resize=f"{SEQUENCES} sequences at {TEMPERATURE}, within {WITHIN:g} A")


def _write(
    made: Made,
    found: Sequence[Described],
    scores: Sequence[Score],
    out: Path,
    facts: dict[str, Any],
    real: Reference | None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if made.facts:
        for name, x in zip(made.names, made.chains):
            write_chain(x, out / STRUCTURES / f"{name}.pdb")
    how = facts if made.facts else {}
    lines = [{"name": name, **_line(d), **how} for name, d in zip(made.names, found)]
    (out / CHAINS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_scores(scores, out / METRICS_FILE)
    write_page(out / PAGE, made, scores, [d.x for d in real.chains] if real else None)


def _line(d: Described) -> dict[str, Any]:
    """Numbers of a chain, NaN as null, and the digest of its coordinates in thousandths of an Angstrom."""
    numbers = {"helix": d.helix, "strand": d.strand, **asdict(d.shape)}
    said = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
    return {**said, "sha256": coordinate_digest(d.x)}


def coordinate_digest(x: Coords) -> str:
    """sha256 of coordinates as structure files hold them, in thousandths of an Angstrom."""
    whole = np.nan_to_num(np.round(1000 * x), nan=-(2.0**31), posinf=2.0**31, neginf=-(2.0**31))
    return hashlib.sha256(whole.astype("<i8").tobytes()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
