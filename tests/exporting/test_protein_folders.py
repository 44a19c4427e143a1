"""Folders of protein models: what they hold, that they run without fewstep, and that nothing of theirs runs unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.draws import Draw
from fewstep.errors import RunFailed, UserError
from fewstep.exporting import reload
from fewstep.exporting.chains import generate_chains, save_chains
from fewstep.exporting.doctor import doctor
from fewstep.exporting.index import foreign_code
from fewstep.exporting.pipeline import addresses, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.models.folder import card, family_of, open_model
from tests.exporting.protein_students import protein_student, protein_teacher

CODE = (
    "pipeline_fewstep_protein_v1.py",
    "scheduler/scheduling_flow_match_protein_v1.py",
    "transformer/modeling_protein_flow_v1.py",
)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def toy():
    return protein_student()


@pytest.fixture
def folder(toy, tmp_path):
    return toy.export(tmp_path / "m")


def _found(folder, level):
    return [finding.what for finding in doctor(folder) if finding.level == level]


def _edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_folder_holds_its_code_and_says_how_it_is_sampled(folder):
    said = card(folder)
    assert tuple(said["remote_code"]) == CODE
    assert (said["pipeline"], said["scheduler"]) == ("FewStepProteinPipeline", "FlowMatchProteinScheduler")
    assert (said["guidance_scale"], said["lengths"], said["nfe"]) == ("none", [None, None], 4)
    text = (folder / "README.md").read_text()
    for words in (
        "pipe(lengths=[100, 120], num_inference_steps=4)",
        'made.save("designs")',
        "0.7079, 0.1718, 0.04121, 0.01 ",
        "0.45 of the noise's standard deviation",
        f"`{CODE[0]}`, `{CODE[1]}` and `{CODE[2]}`",
        "- protein\n",
    ):
        assert words in text
    assert "pipeline_tag" not in text and "image" not in text


def test_a_teachers_card_tells_the_ends_of_its_levels_and_the_lengths_it_makes(tmp_path):
    teacher = protein_teacher(steps=400, renewal=0.5)
    teacher.module.register_to_config(shortest=40, longest=64)
    folder = teacher.export(tmp_path / "m")
    text = (folder / "README.md").read_text()
    assert "| 1, 0.9884, 0.977, ..., 0.000117 |" in text
    assert "lengths=[40, 64]" in text and "0.45 of the noise's variance" in text
    assert "a step replaces at most 0.5 of the noise" in text
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["renewal"] == 0.5


def test_a_guided_networks_card_asks_for_folds(tmp_path):
    folder = protein_student(cath_classes=(3, 4, 5)).export(tmp_path / "m")
    assert card(folder)["guidance_scale"] == "cfg"
    assert "cath=torch.tensor" in (folder / "README.md").read_text()


def test_a_sound_folder_has_nothing_to_mend(folder):
    assert _found(folder, "error") == _found(folder, "warn") == []
    assert "loads, and makes chains in 1 step" in _found(folder, "ok")


def test_a_teacher_is_tried_in_fewer_steps_than_its_own(tmp_path):
    folder = protein_teacher(steps=200).export(tmp_path / "m")
    assert "loads, and makes chains in 50 steps" in _found(folder, "ok")


def test_a_changed_scheduler_is_an_error(folder):
    _edit(folder / "scheduler/scheduler_config.json", first=0)
    assert "first = 0; exported was 30" in _found(folder, "error")[0]
    _edit(folder / "scheduler/scheduler_config.json", first=30, noise_scale=1.0)
    assert "noise_scale = 1.0; exported was 0.45" in _found(folder, "error")[0]


def test_a_collapsed_and_a_broken_network_are_noticed(folder):
    state = load_file(folder / WEIGHTS)
    save_file({name: torch.zeros_like(x) for name, x in state.items()}, folder / WEIGHTS)
    _edit(folder / "fewstep.json", sha256={}, steps=[1])
    _edit(folder / "scheduler/scheduler_config.json", noise_scale=0.0)
    _edit(
        folder / "fewstep.json",
        schedule={**json.loads((folder / "fewstep.json").read_text())["schedule"], "noise_scale": 0},
    )
    assert "all residues in one place" in _found(folder, "warn")[0]
    save_file({**state, "norm.weight": state["norm.weight"] * torch.nan}, folder / WEIGHTS)
    assert "NaN" in _found(folder, "error")[0]


def test_copies_lie_where_they_are_not_run_and_nowhere_else(folder):
    assert foreign_code(folder) == []
    (folder / "scheduler" / "other.py").write_text("")
    assert foreign_code(folder) == [Path("scheduler/other.py")]
    (folder / "scheduler" / "other.py").unlink()
    (folder / "vae").mkdir()
    (folder / "vae" / CODE[0]).write_text("")
    assert foreign_code(folder) == [Path("vae") / CODE[0]]


@pytest.mark.parametrize("name", ("FewStepClassPipeline", "FewStepSD3Pipeline"))
def test_a_class_that_would_run_the_copies_makes_them_foreign(folder, name):
    """Only the protein pipeline takes its parts from the installed package."""
    _edit(folder / "model_index.json", _class_name=["pipeline_fewstep_class_v1", name])
    assert [str(file) for file in foreign_code(folder)] == list(CODE[1:])
    with pytest.raises(UserError, match="brings code"):
        load_pipeline(folder)


def test_loading_runs_nothing_of_the_folder(folder, tmp_path):
    marker = tmp_path / "ran"
    for file in CODE:
        with (folder / file).open("a") as code:
            code.write(f"\nopen({str(marker)!r}, 'w')\n")
    pipeline = load_pipeline(folder)
    for part in (pipeline, pipeline.transformer, pipeline.scheduler):
        assert type(part).__module__.startswith("fewstep_pipelines.")
    generate_chains(pipeline, 1, lengths=(12,))
    open_model(folder)
    assert not marker.exists()
    _edit(folder / "model_index.json", scheduler=["modeling_protein_flow_v1", "FlowMatchProteinScheduler"])
    (folder / "scheduler" / "modeling_protein_flow_v1.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(UserError):
        load_pipeline(folder)
    assert not marker.exists()


def test_a_fresh_process_makes_the_trained_chains(toy, folder):
    lengths = torch.tensor([12, 20])
    noise = addresses(Draw.for_images(0, range(2)))
    start, *later = [noise(i, (2, 20, 3)) for i in range(4)]
    expected = toy.chains(lengths.tolist())
    assert reload_check(folder, expected, start, renoise=later, lengths=lengths) < 1e-5


def test_one_chain_in_four_may_differ_and_no_more(toy, folder, monkeypatch):
    """A distance on the edge of its bin may fall on either side of it."""
    lengths = torch.full((8,), 12)
    expected, start = toy.chains(lengths.tolist()), torch.zeros(8, 12, 3)
    off = torch.zeros(8, 1, 1)

    def checked():
        monkeypatch.setattr(reload, "fresh_samples", lambda *_: expected + off)
        return reload_check(folder, expected, start, lengths=lengths)

    off[:2] = 0.01
    assert checked() < 1e-6
    for wrong in (0.01, float("nan")):
        off[2] = wrong
        with pytest.raises(RunFailed, match="does not make the trained samples"):
            checked()


FRESH = """
import sys
for name in ("fewstep", "fewstep_pipelines", "fewstep_kernels"):
    sys.modules[name] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
folder, noise, out = sys.argv[1:]
noises = load_file(noise)
def sampled(folder, out):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    drawn = iter(noises[f"noise.{i}"] for i in range(len(noises)))
    pipe.scheduler.draw = lambda like, *_: next(drawn)[: len(like), : like.shape[1]]
    pipe(lengths=[12, 20, 12]).save(out)
    return pipe
pipe = sampled(folder, out)
pipe.save_pretrained(out + "/again")
sampled(out + "/again", out + "/2")
other = type(pipe.scheduler).from_config(pipe.scheduler.config, noise_scale=1.0)
assert other.config.noise_scale == 1.0 and type(other).__module__.startswith("diffusers_modules")
"""


def test_diffusers_alone_makes_the_files_of_fewstep_sample_and_saves_a_folder_that_does(folder, tmp_path):
    """Without fewstep and fewstep_pipelines, also from what `save_pretrained` writes there."""
    made = generate_chains(folder, 3, lengths=(12, 20))
    ours = [file.read_text().splitlines() for file in save_chains(made, tmp_path / "ours")]
    noise = addresses(Draw.for_images(0, range(3)))
    save_file({f"noise.{i}": noise(i, (3, 20, 3)) for i in range(4)}, tmp_path / "noise.safetensors")
    command = [sys.executable, "-c", FRESH, str(folder), str(tmp_path / "noise.safetensors"), str(tmp_path / "theirs")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, check=True, env=environment, capture_output=True, cwd=tmp_path)
    for place in ("theirs", "theirs/2"):
        files = sorted((tmp_path / place).glob("*.pdb"))
        assert len(files) == 3
        for file, lines in zip(files, ours, strict=True):
            theirs = file.read_text().splitlines()
            assert len(theirs) == len(lines) and theirs[-2:] == lines[-2:]
            for a, b in zip(theirs[:-2], lines[:-2], strict=True):
                assert a[:30] == b[:30] and a[54:] == b[54:]
                assert all(abs(float(a[i : i + 8]) - float(b[i : i + 8])) < 0.0025 for i in (30, 38, 46))
    assert (tmp_path / "theirs/again" / CODE[2]).exists()
    assert foreign_code(tmp_path / "theirs/again") == []
    saved = generate_chains(tmp_path / "theirs/again", 1, lengths=(12,))
    assert abs(saved.chains[0] - made.chains[0]).max() < 1e-3


def test_a_student_is_loaded_back_with_its_path_and_weights(toy, folder):
    loaded = open_model(folder)
    assert loaded.family == family_of(folder) == "protein_flow"
    assert loaded.path == toy.path
    for name, weight in toy.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], weight)


def test_a_folder_without_a_card_is_known_by_its_network(folder):
    (folder / "fewstep.json").unlink()
    loaded = open_model(folder)
    assert loaded.family == "protein_flow" and type(loaded.path).__name__ == "LogFlowPath"
    assert "no fewstep.json" in _found(folder, "warn")[0]
    assert _found(folder, "error") == []
