"""A model, or a folder of images, under a protocol: drawn, scored, and written down so that it can be compared.

<out>/images, manifest.jsonl, run.json, prompts.txt   see `drawing`
<out>/metrics.json       scores with their protocols, means over images with intervals
<out>/values.jsonl       {"index": 0, "hpsv2": 27.1, ...}: what metrics of images say of each
<out>/protocol.json      what must be equal before two runs are compared
<out>/contact.png        thumbnails
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from .contact_sheet import contact_sheet
from .drawing import Crew, Order, draw_missing, latency_of
from .manifest import METRICS_FILE, write_scores, write_text
from .pictures import Pictures, find_pictures, pictures_of
from .prompt_sets import PromptSet
from .protocols import PromptsSpec, ProtocolFile, changed, load_protocol
from .samples import is_pipeline
from .scorer import Scored, Scorer
from .statistics import SUFFIXES as STATISTICS
from .sweep import sweep

VALUES_FILE, PROTOCOL_FILE, CONTACT_FILE = "values.jsonl", "protocol.json", "contact.png"


def run_protocol(
    model: str | Path,
    protocol: str | Path | ProtocolFile,
    out: str | Path | None = None,
    *,
    prompts: str | None = None,
    reference: str | Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    n: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    scorer: Scorer | None = None,
) -> dict[str, Any]:
    """Scores `model`, an exported pipeline (whose images go to `out`) or a folder of images, under a protocol.

    prompts, reference, n, seed: in place of the protocol's own. metrics: some of the protocol's. A pipeline's run that was
    cut off goes on; under a launcher the processes share the drawing, and the first one scores (the others return {}).

    Returns `model, protocol, n, seed`, how the images were made (`nfe, steps, timesteps, scheduler, guidance, latency`),
    `values` (name -> number), `scores` and `out`. UserError for what is missing, and where to put it.
    """
    folder = Path(model)
    rules = with_options(protocol, prompts=prompts, reference=reference, metrics=metrics, n=n, seed=seed)
    texts = rules.read_prompts()
    pipeline = is_pipeline(folder)
    if pipeline and out is None:
        raise UserError("a protocol keeps the images that it draws, and goes on with them: give --out DIR")
    if pipeline and texts is None and rules.n is None:
        raise UserError(f"{rules.name}: without prompts, nothing says how many images to draw: set `n`, or give --n")
    crew = Crew.here()
    judges = (scorer or Scorer(rules)) if crew.rank == 0 else None  # names and weights before an hour of drawing
    place = Path(out) if out is not None else None
    if pipeline:
        assert place is not None
        order = _order(rules, texts, steps, guidance, batch)
        pictures = pictures_of(place, draw_missing(folder, place, order, crew))
    else:
        pictures = find_pictures(folder, texts, rules.n)
    if judges is None:
        return {}
    scored = judges.score(pictures, texts)
    if place is not None:
        _write(place, rules, pictures, texts, scored)
    return {
        "model": str(folder),
        "protocol": rules.name,
        "n": len(pictures),
        "seed": rules.seed,
        **_facts(pictures, place if pipeline and place is not None else folder),
        "values": {s.protocol.metric: s.value for s in scored.scores},
        "scores": [s.plain() for s in scored.scores],
        "out": str(place) if place is not None else None,
    }


def sweep_protocol(
    model: str | Path,
    protocol: str | Path | ProtocolFile,
    steps: Sequence[int],
    teacher: str | Path | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`sweep` of runs under a protocol, whose networks are loaded once; options as for `run_protocol`."""
    changes = {key: options.pop(key, None) for key in ("prompts", "reference", "metrics", "n", "seed")}
    rules = with_options(protocol, **changes)
    if out is None:
        raise UserError("a protocol keeps the images that it draws, and goes on with them: give --out DIR")
    scorer = Scorer(rules) if Crew.here().rank == 0 else None

    def run(folder: Path, count: int, place: Path | None) -> dict[str, Any]:
        return run_protocol(folder, rules, place, steps=count, scorer=scorer, **options)

    return sweep(model, steps, run, teacher, out)


def with_options(
    protocol: str | Path | ProtocolFile,
    prompts: str | None = None,
    reference: str | Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    **given: Any,
) -> ProtocolFile:
    """The protocol with what the command line says instead. UserError for a metric that it has not."""
    rules = protocol if isinstance(protocol, ProtocolFile) else load_protocol(protocol)
    if prompts is not None:
        given["prompts"] = PromptsSpec(path=prompts, duplicates=rules.prompts is not None and rules.prompts.duplicates)
    if reference is not None:
        given["reference"] = _reference_said(reference)
    if metrics is not None:
        other = next((name for name in metrics if name not in rules.metrics), None)
        if other is not None:
            raise UserError(f"{rules.name} has no metric '{other}': {nearest(other, rules.metrics)}")
        given["metrics"] = {name: rules.metrics[name] for name in metrics}
    return changed(rules, **given)


def _reference_said(reference: str | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(reference, str):
        return dict(reference)
    here = Path(reference).expanduser()
    return {"path": reference} if here.exists() or here.suffix in STATISTICS else {"source": reference}


def _order(
    rules: ProtocolFile, texts: PromptSet | None, steps: int | None, guidance: float | None, batch: int | None
) -> Order:
    count = len(texts) if texts is not None else rules.n
    assert count is not None  # one of the two says it, or an error has been raised
    said = texts.texts if texts is not None else None
    return Order(count, rules.seed, steps, guidance, said, rules.size, batch, rules.latency)


def _facts(pictures: Pictures, folder: Path) -> dict[str, Any]:
    """How drawn images were made; nothing of images from elsewhere."""
    if not pictures.samples:
        return {}
    one = pictures.samples[0]
    timesteps = list(one.timesteps)
    said = {"nfe": one.nfe, "steps": len(timesteps), "timesteps": timesteps}
    timed = latency_of(folder)
    return {**said, "scheduler": one.scheduler, "guidance": one.guidance, **({"latency": timed} if timed else {})}


def _write(out: Path, rules: ProtocolFile, pictures: Pictures, texts: PromptSet | None, scored: Scored) -> None:
    out.mkdir(parents=True, exist_ok=True)
    columns = {name: values.tolist() for name, values in scored.values.items()}
    rows = [{"index": i, **{name: column[i] for name, column in columns.items()}} for i in range(len(pictures))]
    if columns:
        write_text(out / VALUES_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(out / PROTOCOL_FILE, json.dumps(facts_to_compare(rules, pictures, texts), indent=1) + "\n")
    contact_sheet(pictures.files, texts.texts if texts is not None else None, out / CONTACT_FILE)
    write_scores(scored.scores, out / METRICS_FILE)


def facts_to_compare(rules: ProtocolFile, pictures: Pictures, texts: PromptSet | None) -> dict[str, Any]:
    """protocol.json: all that is equal in runs that are compared. Images from elsewhere have no known seed."""
    said: dict[str, Any] = {
        "protocol": rules.name,
        "n": len(pictures),
        "per_prompt": rules.per_prompt,
        "prompts_sha256": texts.sha256 if texts is not None else None,
        "size": rules.size,
        "resize": rules.resize.words if rules.resize is not None else None,
    }
    return {**said, "seed": pictures.samples[0].seed} if pictures.samples else said
