"""The shipped Qwen-Image recipes: planned without weights, in bytes that follow from parameter counts."""

from __future__ import annotations

import pytest

from fewstep.engine.plan import plan
from fewstep.errors import UserError
from fewstep.resources import config

BASE = 20_430_401_088


@pytest.mark.slow
def test_the_adapter_shares_the_teachers_weights():
    """Base in bfloat16, rank 64 on attention, feed-forward and time layers; 4 + 4 + 8 bytes a trained parameter, no EMA."""
    made = plan(config("twinflow/qwen_image_lora.yaml"))
    teacher, student = made.roles
    assert (teacher.name, teacher.tune, teacher.parameters, teacher.weights) == ("teacher", "frozen", BASE, 2 * BASE)
    assert (student.shares, student.tune, student.ema) == ("teacher", "lora", 0)
    assert student.trained == 60 * 64 * (8 * 6144 + 4 * 15360) + 64 * (256 + 3 * 3072)
    assert made.peak_bytes == pytest.approx(2 * BASE + 16 * student.trained, rel=1e-4)
    assert (made.stages[0].batch, made.stages[0].parts, made.stages[0].steps) == (64, 16, 7000)


@pytest.mark.slow
def test_full_tuning_takes_one_network_and_no_teacher():
    """Weights, gradients, Adam and EMA, 20 bytes a parameter; s and sign are two embeddings of 256 to 3072 to 3072."""
    made = plan(config("twinflow/qwen_image.yaml"))
    (student,) = made.roles
    assert (student.tune, student.shares) == ("full", None)
    assert student.trained == BASE + 2 * (256 * 3072 + 3072 * 3072)
    assert made.peak_bytes == pytest.approx(20 * student.trained, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_lora"])
def test_a_batch_is_cut_in_whole_groups_of_rows(name):
    """e2e, mul, any or one, adv: four rows."""
    with pytest.raises(UserError, match="cannot be cut into micro-batches of 2"):
        plan(config(f"twinflow/{name}.yaml"), ["train.micro_batch=2"])
