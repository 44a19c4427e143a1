"""Scoring folders of structures and protein models, through the functions and through the real command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from fewstep.cli.main import main
from fewstep.data.chains import shipped
from fewstep.errors import UserError
from fewstep.evaluation.manifest import compare, read_scores
from fewstep.evaluation.protein.evaluate import coordinate_digest, effective_time, evaluate_chains
from fewstep.evaluation.protein.files import holds_chains, load_reference, read, write_chain
from fewstep.evaluation.protein.sweep import sweep

from .chains import helix, turned

pytest.importorskip("biotite")
pytest.importorskip("tmtools")

REAL = [c.x.astype(float) for c in shipped()[5:3000:500]]
MADE = {"ms_per_chain": 20.0, "nfe": 16.0, "timesteps": (0.7, 0.01), "scheduler": "FlowMatchProteinScheduler"}


def maker(model, n, seed=0, lengths=(100,), steps=None, noise_scale=None, batch=None):
    """Real chains as a model's, of which the share noise_scale (default .45) is stretched and so invalid."""
    noise_scale = 0.45 if noise_scale is None else noise_scale
    bad = round(noise_scale * n)
    chains = [turned(REAL[i % 6], seed + i) * (1.2 if i < bad else 1) for i in range(n)]
    facts = {**MADE, "timesteps": MADE["timesteps"][: steps or 2], "noise_scale": noise_scale}
    return SimpleNamespace(chains=[x.astype(np.float32) for x in chains], lengths=[len(x) for x in chains], **facts)


@pytest.fixture
def model(tmp_path):
    """The folder of a protein model, as far as its index tells."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": ["pipeline_protein", "FewStepProteinPipeline"]}')
    return folder


@pytest.fixture
def structures(tmp_path):
    """Six real chains as PDB files."""
    folder = tmp_path / "real"
    for i, x in enumerate(REAL):
        write_chain(x, folder / f"{i}.pdb")
    return folder


def test_a_folder_of_structures_is_scored(structures):
    found = evaluate_chains(structures)
    assert (found["n"], found["values"]["valid"]) == (6, 1.0)
    assert "novelty" not in found["values"] and "nfe" not in found
    scores = {s["metric"]: s for s in found["scores"]}
    assert scores["valid"]["label"] == "valid[ca]"
    assert scores["diversity"]["impl"] == "fewstep + tmtools" and scores["helix"]["impl"] == "fewstep + biotite"
    lengths = sorted(len(x) for x in REAL)
    assert scores["valid"]["reference"] == f"none, lengths {lengths[0]}-{lengths[-1]}"


def test_a_broken_chain_is_scored_whole(tmp_path):
    """A chain pulled apart in the middle is one invalid chain, not two valid ones."""
    x = REAL[0].copy()
    x[len(x) // 2 :] += 9
    write_chain(x, tmp_path / "x.pdb")
    found = evaluate_chains(tmp_path)
    assert (found["n"], found["values"]["valid"]) == (1, 0.0)


def test_a_reference_adds_novelty_and_distances(structures):
    found = evaluate_chains(structures, reference=structures)
    assert found["values"]["novelty"] == pytest.approx(1, abs=1e-3)
    assert found["values"]["energy"] == pytest.approx(0, abs=1e-3)
    score = next(s for s in found["scores"] if s["metric"] == "w1_helix")
    assert score["reference"].startswith("real n=6 sha256=")


def test_a_model_is_sampled_scored_and_written(model, tmp_path):
    out = tmp_path / "out"
    found = evaluate_chains(model, n=10, lengths=(70,), seed=3, noise_scale=0.2, out=out, maker=maker)
    assert found["values"]["valid"] == pytest.approx(0.8)
    assert (found["nfe"], found["steps"], found["noise_scale"], found["seconds_per_100"]) == (16, 2, 0.2, 2.0)
    assert found["effective_seconds"] == pytest.approx(0.020 / 0.8)
    lines = [json.loads(line) for line in (out / "chains.jsonl").read_text().splitlines()]
    assert [line["valid"] for line in lines] == [False] * 2 + [True] * 8
    assert {line["seed"] for line in lines} == {3} and {line["noise_scale"] for line in lines} == {0.2}
    assert len({line["sha256"] for line in lines}) == 10
    page = (out / "chains.html").read_text()
    assert "<h1>10 chains of" in page and "bond error" in page and page.count("data:image/png;base64,") == 1
    assert [s.value for s in read_scores(out / "metrics.json")] == list(found["values"].values())


def test_what_was_written_scores_alike(model, tmp_path):
    """Coordinates are rounded to thousandths of an Angstrom in files, and no more is lost."""
    out = tmp_path / "out"
    drawn = evaluate_chains(model, n=6, noise_scale=0.0, out=out, maker=maker)
    again = evaluate_chains(out)
    assert again["n"] == 6
    assert again["values"] == pytest.approx(drawn["values"], abs=0.02)
    lines = [json.loads(line) for line in (out / "chains.jsonl").read_text().splitlines()]
    assert [coordinate_digest(x) for x in read(out).chains] == [line["sha256"] for line in lines]


def test_scores_of_other_lengths_or_references_are_not_compared(model, structures, tmp_path):
    outs = [tmp_path / name for name in "abc"]
    evaluate_chains(model, n=6, out=outs[0], maker=maker)
    evaluate_chains(model, n=6, out=outs[1], maker=maker, noise_scale=0.0)
    evaluate_chains(model, n=5, out=outs[2], maker=maker)
    a, b, c = (read_scores(out / "metrics.json")[0] for out in outs)
    assert compare(a, b) == pytest.approx(3 / 6)
    with pytest.raises(UserError, match="cannot be compared"):
        compare(a, c)


def test_effective_time_is_infinite_when_nothing_is_good():
    assert effective_time(10.0, 100, 0.5) == pytest.approx(0.2)
    assert effective_time(10.0, 100, 0.0) == float("inf")


def test_a_sweep_has_a_row_a_scale(model, tmp_path):
    out = tmp_path / "out"
    found = sweep(model, (1.0, 0.5, 0.0), out=out, n=6, maker=maker)
    assert [(row["noise_scale"], row["valid"]) for row in found["rows"]] == [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    assert [row["effective_seconds"] for row in found["rows"]] == [float("inf"), 0.04, 0.02]
    said = json.loads((out / "sweep.json").read_text())
    assert said["rows"][0]["effective_seconds"] is None and said["nfe"] == 16
    assert len(list((out / "noise-0.5" / "structures").iterdir())) == 6


def test_a_sweep_of_structures_makes_no_sense(structures):
    with pytest.raises(UserError, match="is no protein model"):
        sweep(structures)


def test_what_holds_chains(model, structures, tmp_path):
    assert holds_chains(model) and holds_chains(structures)
    (model / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    (tmp_path / "images").mkdir()
    assert not holds_chains(model) and not holds_chains(tmp_path / "images")


def test_shipped_chains_are_a_reference(monkeypatch):
    assert load_reference(None) is None
    monkeypatch.setattr("fewstep.evaluation.protein.files.shipped", lambda: shipped()[:20])
    found = load_reference("chains")
    assert len(found.chains) == 20 and found.name.startswith("chains n=20 sha256=")
    with pytest.raises(UserError, match="no reference 'nothing'"):
        load_reference("nothing")


# ---- the command line


def test_the_command_scores_a_folder_and_keeps_scores(structures, tmp_path, capsys):
    assert main(["evaluate", str(structures), "--metrics", "protein", "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["values"]["valid"]) == (6, 1.0)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["chains.html", "chains.jsonl", "metrics.json"]
    assert main(["evaluate", str(structures), "--n", "3", "--reference", str(structures)]) == 0
    shown = capsys.readouterr().out
    assert "w1_helix" in shown and "real n=6" in shown


def test_the_command_sweeps_a_model(model, capsys, monkeypatch):
    monkeypatch.setattr("fewstep.exporting.chains.generate_chains", maker)
    words = ["evaluate", str(model), "--n", "6", "--length", "50,60", "--noise-scales", "1,.5,0"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "bond error" in shown and "s / valid" in shown
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["valid"] for row in found["rows"]] == [0, 0.5, 1]


def test_the_command_samples_a_folder_through_its_pipeline(tmp_path, capsys):
    """A tiny random network: nothing it makes is valid, equal seeds make equal chains, and nobody waits for a valid one."""
    from fewstep_pipelines import FewStepProteinPipeline, FlowMatchProteinScheduler

    from fewstep.models.protein_flow import PROTEIN_FLOW

    sizes = {"width": 32, "num_layers": 1, "num_heads": 2, "pair_width": 8, "cond_width": 16}
    network = PROTEIN_FLOW.build(size="tiny", **sizes).module
    FewStepProteinPipeline(network, FlowMatchProteinScheduler(), default_steps=2).save_pretrained(tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--n", "4", "--length", "20,24", "--json", "--out"]
    made = []
    for name in "ab":
        assert main([*words, str(tmp_path / name)]) == 0
        made.append(json.loads(capsys.readouterr().out))
    assert made[0]["values"] == made[1]["values"]
    assert (made[0]["nfe"], made[0]["lengths"], made[0]["values"]["valid"]) == (2, "20-24", 0)
    assert made[0]["effective_seconds"] is None
    assert [len(x) for x in read(tmp_path / "a").chains] == [20, 24, 20, 24]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--metrics", "fid"], "chains have the metric protein"),
        (["--reward", "classifier"], "--reward is for images"),
        (["--noise-scales", "1,x"], "--noise-scales=1,x: write numbers"),
        (["--noise-scales", "1,.5"], "is no protein model"),
        (["--length", "a"], "--length=a: write whole numbers"),
        (["--n", "7"], "has 6 chains, not 7"),
        (["--reference", "nothing"], "no reference 'nothing'"),
    ],
)
def test_bad_words_are_refused_in_one_line(structures, capsys, words, said):
    assert main(["evaluate", str(structures), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_a_file_that_is_no_structure_is_named(structures, capsys):
    (structures / "bad.pdb").write_text("nothing of the kind")
    assert main(["evaluate", str(structures)]) == 2
    assert "bad.pdb" in capsys.readouterr().err


def test_options_of_chains_are_refused_for_images(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for words in (["--length", "100"], ["--noise-scales", "1"], ["--compared", "9"], ["--metrics", "protein"]):
        assert main(["evaluate", str(tmp_path), *words]) == 2
        assert f"{words[0]}" in capsys.readouterr().err


def test_a_short_helix_of_one_file_needs_no_second_chain(tmp_path):
    write_chain(helix(16), tmp_path / "h.pdb")
    assert "diversity" not in evaluate_chains(tmp_path)["values"]


def test_designability_is_scored_by_functions_that_the_command_names(structures, tmp_path, monkeypatch, capsys):
    """Half of the chains fold back; the score says who judged, and one of the two alone is refused."""
    (tmp_path / "judges.py").write_text(
        "chains = []\n"
        "def design(x, k, temperature):\n    chains.append(x)\n    return [str(len(chains) - 1)] * k\n"
        "def fold(sequence):\n    i = int(sequence)\n    return chains[i] * (1 if i % 2 else 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["evaluate", str(structures), "--design", "judges:design"]
    assert main([*words, "--fold", "judges:fold", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["values"]["designable"] == 0.5
    (score,) = (s for s in found["scores"] if s["metric"] == "designable")
    assert score["features"] == "judges:design + judges:fold" and score["resize"] == "8 sequences at 0.1, within 2 A"
    for wrong, said in (
        ([], "takes both --design module:function and --fold FOLDER, or neither"),
        (["--fold", "judges:none"], "--fold=judges:none: write module:function"),
        (["--fold", str(tmp_path)], "is no ESMFold folder"),
    ):
        assert main([*words, *wrong]) == 2
        assert said in capsys.readouterr().err
