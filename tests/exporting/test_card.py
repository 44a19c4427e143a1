"""What fewstep.json says about sampling is read back, and the model card says it in words."""

from __future__ import annotations

import json

import pytest
import yaml

from fewstep.exporting.card import licence_of, readme, sampling, schedule_from
from fewstep.exporting.lora import LORA_FILES
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule

SCHEDULES = [
    Schedule("ode", (1.0, 0.5)),
    Schedule("renoise", (1.0, 0.5), 3.0),
    Schedule("renoise", (1.0, 0.5), 9.0, embedded=True, origin=48),
    Schedule("renoise", (1.0,), noise="start"),
]
TEXT = {
    "family": "some",
    "pipeline": "StableDiffusionPipeline",
    "scheduler": "LCMScheduler",
    "remote_code": None,
    "classes": None,
    "prompts": True,
    "folded": {},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_is_read_back_from_json(schedule):
    said = json.loads(json.dumps(sampling(FlowPath(), schedule, [1, 2])))
    assert schedule_from(said["schedule"]) == schedule


def test_cards_of_before_picked_grids_are_read():
    assert schedule_from({"kind": "ode", "u": [1.0], "guidance": 2.0, "noise": "fresh"}) == Schedule("ode", (1.0,), 2.0)


def test_a_second_pass_is_counted_for_guidance_that_is_no_input():
    assert [sampling(FlowPath(), schedule, [2])["nfe"] for schedule in SCHEDULES] == [2, 4, 2, 1]


@pytest.mark.parametrize(
    ("schedule", "means", "call", "words"),
    [
        (SCHEDULES[0], "baked", "num_inference_steps=2)", "baked in: guidance_scale is ignored"),
        (SCHEDULES[1], "cfg", "num_inference_steps=2, guidance_scale=3)", "classifier-free guidance"),
        (SCHEDULES[2], "embedded", "num_inference_steps=2, guidance_scale=9)", "fed to the network; trained on 3..15"),
    ],
)
def test_the_model_card_of_a_text_model_says_what_guidance_scale_means(schedule, means, call, words):
    said = {**TEXT, **sampling(FlowPath(), schedule, [2]), "guidance_scale": means, "guidance_range": [3.0, 15.0]}
    text = readme("m", said)
    assert "pipeline_tag: text-to-image" in text
    assert f'pipe(prompt="a photo of a cat", {call}.images[0]' in text
    assert f"| the pipeline's `guidance_scale` | {words}" in text
    assert "load_lora_weights" not in text
    assert 'pipe.load_lora_weights("FOLDER")' in readme("m", {**said, "lora": "pytorch_lora_weights.safetensors"})


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A\n", {"licence": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE.md\n---\n",
            {"licence": "other", "licence_name": "own", "licence_link": "LICENSE.md"},
        ),
        ("---\nlicense: other\n---\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("# A model\n\n---\nlicense: mit\n---\n", {}),
        (None, {}),
    ],
)
def test_the_licence_of_a_base_is_read_off_its_card(tmp_path, card, said):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == said


def test_the_hub_learns_base_and_licence_from_the_head(tmp_path, monkeypatch):
    """A base of the hub's is linked; a folder here of the same form is not."""
    said = {**TEXT, **sampling(FlowPath(), SCHEDULES[0], [2]), "guidance_scale": "baked", "base": "me/base"}
    licence = {"licence": "other", "licence_name": "own", "licence_link": "LICENSE.md"}
    text = readme("m", {**said, **licence})
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "me/base" and "Licence: own." in text
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "own", "LICENSE.md")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "base").mkdir(parents=True)
    assert "base_model" not in yaml.safe_load(readme("m", said).split("---")[1])


@pytest.mark.parametrize("layout", ["peft", "kohya", "comfyui"])
def test_the_card_says_who_reads_a_lora_file_that_is_not_diffusers_own(layout):
    said = {**TEXT, **sampling(FlowPath(), SCHEDULES[0], [2]), "guidance_scale": "baked", "lora": LORA_FILES[layout]}
    text = readme("m", said)
    assert f"as an adapter of its base: `{LORA_FILES[layout]}`, " in text
    assert {"peft": "PeftModel", "kohya": "kohya's trainers", "comfyui": "models/loras"}[layout] in text
