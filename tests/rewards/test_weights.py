"""Where weights are looked for, and what is refused: nothing is downloaded, nothing is unpickled."""

import json
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.rewards.base import Asked
from fewstep.rewards.registry import make_reward

from .tiny import PROMPTS, clip, images


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    clip(place)
    return place


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "clip")


def _value(folder):
    return make_reward({"clip": str(folder)})(images(), Asked(PROMPTS))


def test_absent_weights_name_the_reward_the_command_and_the_place():
    with pytest.raises(UserError) as caught:
        make_reward("hpsv2")
    said = str(caught.value)
    assert "config.reward.hpsv2.from: 'xswu/HPSv2' is neither here nor in the local Hugging Face cache" in said
    assert "`hf download xswu/HPSv2 HPS_v2.1_compressed.pt`" in said
    assert said.endswith("then set config.reward.hpsv2.from=FOLDER")
    assert "\n" not in said


def test_without_transformers_the_mend_is_told(folder, monkeypatch):
    monkeypatch.setattr("fewstep.rewards.weights.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs transformers: pip install "fewstep\[text\]"'):
        _value(folder)


def test_a_hub_id_in_the_local_cache_is_found(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--owner--judge"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(folder, cache / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(_value("owner/judge"), _value(folder))


def test_a_pickle_is_refused_and_the_command_in_the_error_converts_it(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": state}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a pickle, which is never loaded; convert it once: python -c") as caught:
        _value(folder)
    python, flag, code = shlex.split(str(caught.value).split("convert it once: ")[1])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    converted = load_file(folder / "pytorch_model.safetensors")
    assert all(torch.equal(converted[name], state[name]) for name in state)
    assert _value(folder).shape == (3,)


def test_a_pickle_named_outright_is_refused(tmp_path):
    torch.save({}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match=r"HPS_v2\.1_compressed\.pt' is a pickle"):
        make_reward({"hpsv2": str(tmp_path / "HPS_v2.1_compressed.pt")})


def test_a_pickle_beside_safetensors_is_passed_over(folder):
    before = _value(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert torch.equal(_value(folder), before)


def test_sharded_weights_are_put_together(folder):
    before, state = _value(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(_value(folder), before)


def test_constants_of_older_files_are_passed_over(folder):
    before, state = _value(folder), load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    save_file(state, folder / "model.safetensors")
    assert torch.equal(_value(folder), before)


def test_half_precision_files_are_read_in_float32(folder):
    state = {name: t.half() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors")
    reward = make_reward({"clip": str(folder)})
    assert {p.dtype for p in reward.parameters()} == {torch.float32}
    assert not any(t.is_meta for t in [*reward.parameters(), *reward.buffers()])


def _two_models(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def _cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _another_type(folder):
    (folder / "config.json").write_text('{"model_type": "siglip"}')


def _other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["image_size"] = 24
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_two_models, r"holds 2 models: name one, config\.reward\.clip\.from=.*a\.safetensors"),
        (_cut_short, "cannot read .*model.safetensors.*fetch it anew"),
        (_another_type, "holds a model of type siglip, not clip"),
        (_other_shape, "not the weights of this reward: size mismatch for vision_model"),
        (lambda f: (f / "config.json").unlink(), r"has no readable config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors in .*fetch them"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        _value(folder)
    assert "\n" not in str(caught.value)
