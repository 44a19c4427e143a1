"""What fewstep.json says about sampling is read back, and the model card says it in words."""

from __future__ import annotations

import json

import pytest

from fewstep.exporting.card import readme, sampling, schedule_from
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
