"""The doctor finds what breaks a folder, and runs nothing of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.exporting.doctor import doctor
from fewstep.exporting.folder import export
from fewstep.models.registry import FAMILIES

from .students import EPS, FLOW, SHIFTED, student

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("doctor")
    student("unet2d", EPS, "ode", 4, classes=None).export(root / "vp")
    student("unet2d", SHIFTED, "ode", 4).export(root / "flow")
    student("dit", FLOW, "ode", 2).export(root / "own")
    return root


@pytest.fixture
def folder(made, tmp_path):
    """Copies of an unconditional DDIM folder, which a test may break."""
    return shutil.copytree(made / "vp", tmp_path / "vp")


def _found(folder, level):
    return [f"{f.what} -> {f.mend}" for f in doctor(folder) if f.level == level]


def _edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", ["vp", "flow", "own"])
def test_a_sound_folder_has_only_good_news(made, name):
    assert {f.level for f in doctor(made / name)} == {"ok"}
    text = " ".join(_found(made / name, "ok"))
    for part in ("family", "sha256", "levels that were trained", "diffusers", "samples in 1 step"):
        assert part in text
    assert ("trust_remote_code" in text) == (name == "own")


def test_a_flipped_byte_is_found(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    (error,) = _found(folder, "error")
    assert WEIGHTS in error and "sha256 differs" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_spacing": "leading"}, "timestep_spacing = leading; exported was trailing"),
        ({"clip_sample": True}, "clip_sample = True; exported was False"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one = False"),
        ({"thresholding": True}, "thresholding = True"),
        ({"prediction_type": "sample"}, "prediction_type = sample; exported was epsilon"),
        ({"_class_name": "PNDMScheduler"}, "the scheduler is PNDMScheduler; exported was DDIMScheduler"),
    ],
)
def test_a_wrong_scheduler_is_found(folder, changes, message):
    _edit(folder / "scheduler" / "scheduler_config.json", **changes)
    errors = _found(folder, "error")
    assert message in errors[0] and "restore scheduler" in errors[0]


def test_steps_off_the_grid_that_a_student_was_picked_from_are_found(tmp_path):
    folder = student("unet2d", SHIFTED, "renoise", 4, origin=48).export(tmp_path / "m")
    assert {f.level for f in doctor(folder)} == {"ok"}
    _edit(folder / "fewstep.json", steps=[4, 5])
    assert _found(folder, "warn") == [
        "5 steps call the network off the 48 levels that were trained -> sample it in 4 steps"
    ]


def test_the_timesteps_of_a_wrong_spacing_are_shown(folder):
    _edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing="leading")
    assert any("feeds timesteps 750 500 250 0; trained were 999 749 499 249" in e for e in _found(folder, "error"))


def test_a_wrong_shift_is_found(made, tmp_path):
    folder = shutil.copytree(made / "flow", tmp_path / "flow")
    _edit(folder / "scheduler" / "scheduler_config.json", flow_shift=1.0)
    assert "flow_shift = 1.0; exported was 3.0" in _found(folder, "error")[0]


def test_a_pickle_is_found_and_nothing_is_loaded(folder, monkeypatch):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    monkeypatch.setattr("fewstep.exporting.checks_sampling.load_pipeline", lambda *a, **k: pytest.fail("loaded"))
    (error,) = _found(folder, "error")
    assert "pickle" in error and "safetensors" in error


@pytest.mark.parametrize("name", [WEIGHTS, "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_a_missing_file_is_found(folder, name):
    (folder / name).unlink()
    assert any(name in error and "missing" in error for error in _found(folder, "error"))


def test_weights_that_are_no_numbers_are_found(folder):
    state = load_file(folder / WEIGHTS)
    state["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, folder / WEIGHTS)
    assert any("conv_in.weight holds NaN" in error for error in _found(folder, "error"))


@pytest.mark.parametrize("broken", ["{", "[]", '{"format": 1}'])
def test_an_unreadable_card_is_found(folder, broken):
    (folder / "fewstep.json").write_text(broken)
    assert "cannot be read" in _found(folder, "error")[0]


def test_a_card_of_the_future_is_found(folder):
    _edit(folder / "fewstep.json", format=99)
    assert "format 99" in _found(folder, "error")[0]


def test_a_broken_index_is_found(folder):
    (folder / "model_index.json").write_text("{")
    assert "cannot be read" in _found(folder, "error")[0]


def test_a_stock_folder_without_card_is_warned_of_leading_spacing(folder):
    (folder / "fewstep.json").unlink()
    _edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing="leading")
    warnings = _found(folder, "warn")
    assert "no fewstep.json" in warnings[0] and "'leading'" in warnings[1]
    assert not _found(folder, "error")


def test_foreign_code_is_named_and_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "unet" / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    warnings = _found(folder, "warn")
    assert "unet/modeling.py" in warnings[0] and "not loaded" in warnings[1]
    assert not marker.exists()


def test_a_dead_network_is_noticed(folder):
    state = {name: torch.zeros_like(x) for name, x in load_file(folder / WEIGHTS).items()}
    state["conv_out.bias"] += 50.0
    save_file(state, folder / WEIGHTS)
    _edit(folder / "fewstep.json", sha256={})
    assert "saturated" in _found(folder, "warn")[0]


def test_networks_that_do_not_generate_are_loaded_by_their_family(tmp_path):
    cnn = FAMILIES.get("cnn").build(width=4, classes=2)
    folder = export(cnn.module, FAMILIES.get("cnn"), None, None, tmp_path / "m", card={})
    assert _found(folder, "ok")[-1].startswith("loads as family cnn")
    (folder / "config.json").write_text('{"width": 5, "classes": 2}')
    assert "does not load" in _found(folder, "error")[0]


def test_no_folder_is_bad_input(tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        doctor(tmp_path / "nowhere")
