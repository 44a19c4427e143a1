"""What every reward promises; what was asked of the rows of a batch; sums; what a recipe may say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep import rewards
from fewstep.data.batch import Batch, Cond
from fewstep.errors import UserError
from fewstep.rewards.base import Asked, Reward, Weighted
from fewstep.rewards.linear import Linear, LinearSpec
from fewstep.rewards.registry import REWARDS, make_reward

X = torch.linspace(-1, 1, 3 * 2 * 4 * 4).reshape(3, 2, 4, 4)


class Rounded(Reward):
    """Not differentiable: counts bright pixels."""

    name = "rounded"
    differentiable = False

    def __init__(self, spec=None):
        super().__init__()

    def score(self, images, asked):
        return (images > 0).double().mean((1, 2, 3))


class Labelled(Reward):
    """Needs labels."""

    name = "labelled"
    needs = "label"

    def score(self, images, asked):
        return asked.labels * images.mean((1, 2, 3))


def test_asked_reads_prompts_and_labels_of_a_batch():
    fields = {"prompt": ["a", "b"], "cond": Cond(label=torch.tensor([3, 4]))}
    asked = Asked.of(Batch(torch.arange(2), fields))
    assert asked.prompts == ["a", "b"]
    assert asked.labels.tolist() == [3, 4]
    assert Asked.of(Batch(torch.arange(2), {"cond": Cond()})) == Asked()
    assert Asked.of(Batch(torch.arange(2), {"x0": X})) == Asked()


def test_repeated_rows_are_those_of_repeated_images():
    """R(cat([x] * k), asked repeated) = cat([R(x, asked)] * k): prompts and images stay paired."""
    asked = Asked(["a", "b", "c"], torch.tensor([1.0, 2.0, 3.0]))
    again = asked.repeated(3)
    assert again.prompts == ["a", "b", "c"] * 3
    assert torch.equal(Labelled()(torch.cat([X] * 3), again), torch.cat([Labelled()(X, asked)] * 3))
    assert Asked().repeated(3) == Asked()


@pytest.mark.parametrize("rows", [slice(1, 3), slice(None, None, 2), torch.tensor([2, 0, 0])])
def test_prompts_and_labels_are_cut_alike(rows):
    asked = Asked(("0", "1", "2"), torch.arange(3))
    cut = asked[rows]
    assert cut.prompts == [str(i) for i in cut.labels.tolist()]
    assert torch.equal(cut.labels, torch.arange(3)[rows])
    assert asked[rows].prompts == Asked(asked.prompts)[rows].prompts
    assert Asked()[rows] == Asked()


def test_what_a_reward_needs_is_asked_for():
    with pytest.raises(UserError, match="'labelled' scores images by their label, which these batches lack"):
        Labelled()(X, Asked(["a", "b", "c"]))
    with pytest.raises(UserError, match="got 3 images and 2 labels: one each"):
        Labelled()(X, Asked(labels=torch.arange(2)))


def test_values_are_float32_and_without_a_graph_where_there_is_no_gradient():
    x = X.double().requires_grad_()
    assert Rounded()(x).dtype == Linear()(x).dtype == torch.float32
    assert not Rounded()(x).requires_grad
    assert Linear()(x).requires_grad


def test_a_reward_stays_in_eval_mode():
    assert not Linear().train().training
    assert not torch.nn.Sequential(Linear()).train()[0].training


def test_a_sum_is_the_weighted_sum_of_values_and_gradients():
    parts = {"classifier": {"weight": 0.3}, "linear": {"direction": "checkerboard", "weight": -2}}
    x, asked = torch.rand(3, 1, 8, 8) * 2 - 1, Asked(labels=torch.arange(3))
    grads = []
    for said in (parts, "classifier", {"linear": {"direction": "checkerboard"}}):
        leaf = x.clone().requires_grad_()
        value = make_reward(said)(leaf, asked)
        grads.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    for whole, a, b in zip(*grads):
        assert torch.allclose(whole, 0.3 * a - 2 * b, atol=1e-5)


def test_a_sum_has_a_gradient_when_all_its_parts_do():
    parts = {"linear": Linear(), "rounded": Rounded()}
    assert not Weighted(parts, {"linear": 1, "rounded": 0.5}).differentiable
    assert Weighted({"linear": Linear()}, {"linear": 2}).differentiable
    assert Weighted({"a": Linear(), "b": Labelled()}, {"a": 1, "b": 1}).needs == "label"


def test_a_part_of_weight_zero_is_checked_and_not_built(monkeypatch):
    monkeypatch.setitem(REWARDS.table, "rounded", f"{__name__}:Rounded")
    assert make_reward({"linear": None, "rounded": {"weight": 0}}).differentiable
    assert not make_reward({"linear": None, "rounded": {"weight": 0.1}}).differentiable
    assert make_reward({"hpsv2": {"weight": 0}, "linear": None})(X).shape == (3,)
    with pytest.raises(UserError, match="unknown key 'form': did you mean 'from'"):
        make_reward({"hpsv2": {"weight": 0, "form": "x"}, "linear": None})


def test_one_reward_of_weight_one_is_itself():
    assert isinstance(make_reward("linear"), Linear)
    half = make_reward({"linear": {"weight": 0.5}})
    assert torch.allclose(half(X), 0.5 * Linear()(X))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("hspv2", "unknown reward 'hspv2': did you mean 'hpsv2'"),
        ({"linear": {"wieght": 1}}, r"config\.reward\.linear: unknown key 'wieght': did you mean 'weight'"),
        ({"linear": 3}, r"config\.reward\.linear=3 is no mapping of options: known: direction, weight"),
        ({"classifier": "x"}, r"config\.reward\.classifier='x' is no mapping"),
        ({"linear": {"weight": float("nan")}}, r"config\.reward\.linear: weight=nan"),
        ({"linear": {"weight": 0}}, "every weight is 0"),
        ({}, "names no reward: known: aesthetic, classifier"),
        ({"clip": {"from": "x", "precision": "fp8"}}, r"config\.reward\.clip: precision='fp8': input should be 'fp32'"),
    ],
)
def test_mistakes_in_a_recipe_are_named_with_the_mend(said, message):
    with pytest.raises(UserError, match=message):
        make_reward(said)


def test_rewards_come_frozen():
    reward = make_reward({"classifier": None, "linear": None})
    assert len(list(reward.parameters())) > 5
    assert not any(p.requires_grad for p in reward.parameters())


def test_the_table_loads_no_torch():
    code = "import sys, fewstep.rewards.registry; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_heavy_libraries_are_imported_where_they_are_used():
    files = list(Path(rewards.__file__).parent.glob("*.py"))
    assert len(files) > 10
    assert not [f for f in files if re.search(r"^(from|import) (transformers|accelerate|clip)\b", f.read_text(), re.M)]


def test_every_name_in_the_table_is_its_rewards_name():
    for name in REWARDS.table:
        assert REWARDS.get(name).name == name
        assert REWARDS.get(name).__doc__


def test_linear_options_are_typed():
    assert LinearSpec(direction=2).direction == 2.0
