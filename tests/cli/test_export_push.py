"""`fewstep export`: layouts of the LoRA file, and `--push`, held to a stub of the hub that writes down its calls."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from fewstep.cli.main import main
from fewstep.errors import UserError
from fewstep.exporting.push import push
from fewstep.models.folder import card
from tests.conftest import TINY_UNET
from tests.data.tiny_captions import tiny_captions
from tests.models.tiny_sd import tiny_sd


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on pixels whose student has no adapter."""
    root = tmp_path_factory.mktemp("push")
    recipe = {
        "method": "flow_matching",
        "student": {"from": "unet2d", "build": TINY_UNET},
        "config": {"steps": 2},
        "data": {"train": {"source": "digits"}},
        "train": {"steps": 1, "batch": 4, "check_export": False},
    }
    return trained(root, recipe)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    """A text-to-image run whose student is an adapter, of a base whose card names its licence."""
    root = tmp_path_factory.mktemp("lora")
    tiny_sd(root / "base")
    (root / "base" / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Base\n")
    tiny_captions(root / "pictures")
    recipe = {
        "method": "lcm",
        "teacher": {"from": str(root / "base")},
        "student": {"tune": "lora", "lora": {"rank": 4, "alpha": 2, "targets": "wide"}},
        "config": {"steps": [1, 2], "guidance_scale": 3.0},
        "data": {"train": {"source": "captions", "path": str(root / "pictures"), "size": 16}},
        "train": {"steps": 1, "batch": 4, "check_export": False},
    }
    return trained(root, recipe)


def trained(root: Path, recipe: dict[str, Any]) -> Path:
    """The run folder of a recipe."""
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(root / "recipe.yaml"), "--quiet", "--out", str(root / "run")]) == 0
    return root / "run"


class Hub:
    """What `HfApi` is asked, in order. `there`: whether the repository is private already, None for a new one."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.there: bool | None = None
        self.fails: dict[str, Exception] = {}

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id: str, **said: Any) -> str:
        """Its address."""
        self._note("create_repo", repo_id=repo_id, **said)
        self.there = bool(said["private"]) if self.there is None else self.there
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> Any:
        """Whether it is private."""
        self._note("repo_info", repo_id=repo_id)
        return SimpleNamespace(private=self.there)

    def upload_folder(self, **said: Any) -> None:
        """The files as they are at that moment."""
        files = {p.relative_to(said["folder_path"]).as_posix() for p in Path(said["folder_path"]).rglob("*.*")}
        self._note("upload_folder", files=files, **said)

    def _note(self, name: str, **said: Any) -> None:
        self.calls.append((name, said))
        if name in self.fails:
            raise self.fails[name]

    def names(self) -> list[str]:
        """Of the calls."""
        return [name for name, _ in self.calls]


@pytest.fixture
def hub(monkeypatch) -> Hub:
    """A hub that one is logged in to, at a terminal."""
    stub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    return stub


def answering(monkeypatch, hub: Hub, yes: bool) -> list[str]:
    """Questions that `typer.confirm` was asked, before which the hub has heard nothing."""
    asked: list[str] = []

    def confirm(text: str, **said: Any) -> bool:
        assert not hub.calls and said == {"err": True}
        asked.append(text)
        return yes

    monkeypatch.setattr("typer.confirm", confirm)
    return asked


def exported(run: Path, to: Path, *words: str) -> list[str]:
    """The words of the command."""
    return ["export", str(run), "--to", str(to), *words]


def test_a_yes_uploads_the_whole_folder_and_the_address_is_answered(run, tmp_path, hub, monkeypatch, capsys):
    asked = answering(monkeypatch, hub, yes=True)
    to = tmp_path / "m"
    assert main(exported(run, to, "--push", "me/student", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(to), "pushed": "https://huggingface.co/me/student"}
    assert (
        len(asked) == 1 and f"upload '{to}' (" in asked[0] and "https://huggingface.co/me/student (public" in asked[0]
    )
    assert hub.calls[0] == ("create_repo", {"repo_id": "me/student", "private": None, "exist_ok": True})
    name, said = hub.calls[-1]
    assert (name, said["repo_id"], said["folder_path"]) == ("upload_folder", "me/student", to)
    assert {"README.md", "fewstep.json", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= said[
        "files"
    ]


def test_a_no_leaves_the_folder_and_asks_the_hub_nothing(run, tmp_path, hub, monkeypatch, capsys):
    answering(monkeypatch, hub, yes=False)
    assert main(exported(run, tmp_path / "m", "--push", "me/student", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["pushed"] is None
    assert (tmp_path / "m" / "fewstep.json").is_file() and not hub.calls


def test_scripts_say_yes_and_private(run, tmp_path, hub, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: pytest.fail("asked"))
    assert main(exported(run, tmp_path / "m", "--push", "me/student", "--private", "--yes")) == 0
    assert hub.calls[0][1]["private"] is True
    assert hub.names() == ["create_repo", "repo_info", "upload_folder"]


def test_private_files_never_go_to_a_repository_that_is_public_already(run, tmp_path, hub, capsys):
    hub.there = False
    assert main(exported(run, tmp_path / "m", "--push", "me/student", "--private", "--yes")) == 2
    assert "is there already and is public" in capsys.readouterr().err
    assert "upload_folder" not in hub.names()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push", "student"], "--push student: write OWNER/NAME"),
        (["--push", "me/student"], "add --yes"),
        (["--private"], "--private goes with --push"),
        (["--yes"], "--yes goes with --push"),
    ],
)
def test_what_cannot_end_in_an_upload_is_refused_before_the_work(
    run, tmp_path, hub, monkeypatch, capsys, words, message
):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(exported(run, tmp_path / "m", *words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not hub.calls


def test_a_missing_token_is_told_before_the_work(run, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(exported(run, tmp_path / "m", "--push", "me/student", "--yes")) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def refusal(status: int) -> Exception:
    """An error as the hub's client raises it."""
    error = OSError("Client Error\nRequest ID: 1")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("call", "error", "code", "message"),
    [
        ("create_repo", ConnectionError("Cannot reach huggingface.co: offline mode\nmore"), 2, "offline mode; "),
        ("create_repo", refusal(401), 2, "the token is not valid: run `hf auth login`"),
        ("create_repo", refusal(403), 2, "the token may not write there"),
        ("upload_folder", OSError("broken pipe"), 1, "is whole, push it again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(run, tmp_path, hub, capsys, call, error, code, message):
    hub.fails[call] = error
    assert main(exported(run, tmp_path / "m", "--push", "me/student", "--yes")) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0] and str(tmp_path / "m") in said[0]
    assert (tmp_path / "m" / "fewstep.json").is_file()


def test_the_real_client_asks_nobody_offline(tmp_path, monkeypatch):
    """Its own error becomes one line too."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot upload to me/student: OfflineModeIsEnabled: .*; '.*' stays as it is"):
        push(tmp_path, "me/student")


@pytest.mark.parametrize(
    ("layout", "file", "key"),
    [
        ("kohya", "lora_kohya.safetensors", "lora_unet_down_blocks_0_attentions_0_proj_in.alpha"),
        ("comfyui", "lora_comfyui.safetensors", "diffusion_model.input_blocks.1.1.proj_in.alpha"),
    ],
)
def test_the_lora_file_has_the_layout_that_was_asked(lora_run, tmp_path, layout, file, key):
    from safetensors.torch import load_file

    assert main(exported(lora_run, tmp_path / "m", "--lora-layout", layout)) == 0
    assert card(tmp_path / "m")["lora"] == file and file in card(tmp_path / "m")["sha256"]
    assert load_file(tmp_path / "m" / file)[key] == 2
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 1
    text = (tmp_path / "m" / "README.md").read_text()
    assert f"`{file}`, in the keys of" in text and "load_lora_weights" not in text


def test_the_model_card_has_the_licence_of_the_base_and_says_what_is_in_the_folder(lora_run, tmp_path):
    assert main(exported(lora_run, tmp_path / "m", "--lora-layout", "peft")) == 0
    head = yaml.safe_load((tmp_path / "m" / "README.md").read_text().split("---")[1])
    assert head["license"] == "creativeml-openrail-m"
    assert {"fewstep", "distillation", "lcm", "lora"} <= set(head["tags"])
    assert (tmp_path / "m" / "lora_peft" / "adapter_config.json").is_file()
    assert main(["doctor", str(tmp_path / "m")]) == 0


@pytest.mark.parametrize(
    ("layout", "message"),
    [("comfy", "did you mean 'comfyui'"), ("kohya", "trained no adapter (tune: lora)")],
)
def test_a_layout_that_cannot_be_is_refused(run, tmp_path, capsys, layout, message):
    assert main(exported(run, tmp_path / "m", "--lora-layout", layout)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
