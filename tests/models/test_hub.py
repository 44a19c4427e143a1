"""Finding models: folders, shipped assets, and hub ids that are in the local cache already."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from fewstep.engine.plan import plan
from fewstep.errors import UserError
from fewstep.models.folder import open_model
from fewstep.models.hub import cached, find_model
from fewstep.models.known import KNOWN
from fewstep.resources import asset

from .tiny_sd import tiny_sd

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "hub"


def put(cache: Path, name: str) -> Path:
    """An empty snapshot of `name`, laid out as huggingface_hub does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_folders_and_assets_are_found_where_they_are(tmp_path):
    """A path as it is, `shipped:` among the assets."""
    assert find_model(tmp_path) == tmp_path
    assert find_model("shipped:digits") == asset("digits")


def test_a_hub_id_is_looked_up_in_the_cache(cache):
    """The snapshot that refs/main names."""
    assert cached(SD15) is None
    snapshot = put(cache, SD15)
    assert cached(SD15) == find_model(SD15) == snapshot


def test_a_folder_goes_before_a_cached_model_of_its_name(cache, tmp_path, monkeypatch):
    """Relative paths look like hub ids."""
    put(cache, "runs/teacher")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/teacher").mkdir(parents=True)
    assert find_model("runs/teacher") == Path("runs/teacher")


def test_an_absent_hub_id_names_the_command_that_fetches_it():
    """And the folder alternative; nothing is downloaded."""
    with pytest.raises(UserError, match=f"no model folder '{SD15}'.*pipeline saved by diffusers.*`hf download {SD15}`"):
        open_model(SD15)


@pytest.mark.parametrize("source", ["teacher", "/nowhere/teacher", "a/b/c", "../a", "shipped:nothing"])
def test_what_is_no_hub_id_is_not_offered_for_download(source):
    """Only owner/name is."""
    with pytest.raises(UserError, match="no model folder") as error:
        find_model(source)
    assert "hf download" not in str(error.value)


def test_a_cached_pipeline_is_opened_beside_pickles_that_stay_unread(cache, tmp_path):
    """Snapshots of published models often hold both; in a folder of one's own a pickle is refused."""
    snapshot = put(cache, SD15)
    shutil.copytree(tiny_sd(tmp_path / "tiny"), snapshot, dirs_exist_ok=True)
    (snapshot / "unet/diffusion_pytorch_model.bin").write_bytes(b"never read")
    loaded = open_model(SD15)
    assert loaded.family == "stable_diffusion"
    assert loaded.around.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="holds a pickle"):
        open_model(snapshot)


# ---- plans


def recipe(source: str) -> dict[str, Any]:
    """LCM with a guidance input."""
    return {
        "method": "lcm",
        "teacher": {"from": source},
        "data": {"train": {"source": "labels", "classes": 2}},
        "train": {"steps": 1, "batch": 1},
    }


@pytest.mark.parametrize(("name", "billions"), list(zip(KNOWN, [0.8595, 0.8659, 0.8659, 2.5675])))
def test_a_known_id_is_planned_without_its_weights(name, billions):
    """Parameters of the teacher, and of the student with its guidance input (256 x first width)."""
    teacher, student = plan(recipe(name)).roles
    assert teacher.parameters / 1e9 == pytest.approx(billions, abs=1e-4)
    assert student.parameters - teacher.parameters == 256 * 320
    assert teacher.weights == 4 * teacher.parameters


def test_a_plan_of_an_unknown_id_asks_for_the_model():
    """Its sizes are written nowhere."""
    with pytest.raises(UserError, match="hf download someone/else"):
        plan(recipe("someone/else"))


def test_a_folder_is_planned_from_its_configs_alone(tmp_path):
    """No weight is read, so damaged ones do not matter, and nothing lies in memory."""
    folder = tiny_sd(tmp_path / "tiny", "sdxl")
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with torch.device("meta"):
        module = open_model(folder).module
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert plan(recipe(str(folder))).roles[0].parameters == sum(p.numel() for p in module.parameters())
