"""Closed-form networks against numerical integration, and their folders."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.models.folder import open_model
from fewstep.models.oracle import GAUSSIAN, GAUSSIAN_MIXTURE, MLP, MLPNet
from fewstep.models.registry import FAMILIES
from fewstep.nets.lora import Adapter

PARTS = {"means": [[-1.0], [0.5]], "std": [0.3, 0.6], "weights": [[0.7, 0.3], [0.2, 0.8]]}


def posterior_velocity(x: torch.Tensor, t: float, weights: list[float]) -> torch.Tensor:
    """E[eps - x0 | x_t = x] of the one-dimensional mixture, by summing over a fine grid of x0."""
    x0 = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    normal = torch.distributions.Normal
    prior = sum(w * normal(m[0], s).log_prob(x0).exp() for w, m, s in zip(weights, PARTS["means"], PARTS["std"]))
    likelihood = normal((1 - t) * x0, t).log_prob(x.double()[:, None]).exp()
    density = prior * likelihood
    mean = (density * x0).sum(1) / density.sum(1)
    return (x.double() - mean) / t  # eps - x0 = (x_t - x0) / t


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("label, weights", [(0, [0.7, 0.3]), (1, [0.2, 0.8]), (2, [0.45, 0.55])])
def test_mixture_velocity_is_the_posterior_mean(t, label, weights):
    """v = E[eps - x0 | x_t, c]; label 2 is the null class with the mean of the weights."""
    network = GAUSSIAN_MIXTURE.build(**PARTS).module.double()
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)
    v = network(x[:, None], torch.full((21,), 1000 * t, dtype=torch.float64), torch.full((21,), label))
    torch.testing.assert_close(v[:, 0], posterior_velocity(x, t, weights), rtol=1e-5, atol=1e-5)


def test_gaussian_velocity_is_the_printed_formula():
    """v = -m + (t - (1-t) s^2) / A (x - (1-t) m), A = (1-t)^2 s^2 + t^2, in each dimension."""
    network = GAUSSIAN.build(means=[[1.0, -2.0], [0.0, 0.5]], std=[0.7, 1.2]).module
    m, s = torch.tensor([1.0, -2.0]), 0.7
    t, x = torch.rand(50), torch.randn(50, 2)
    a = (t[:, None] - (1 - t[:, None]) * s**2) / ((1 - t[:, None]) ** 2 * s**2 + t[:, None] ** 2)
    expected = -m + a * (x - (1 - t[:, None]) * m)
    torch.testing.assert_close(network(x, 1000 * t, torch.zeros(50, dtype=torch.long)), expected)


def test_null_class_of_a_gaussian_is_the_average_unless_given():
    means = {"means": [[1.0], [0.0]], "std": [0.5, 1.5]}
    network = GAUSSIAN.build(**means).module
    assert (network.means[2].item(), network.log_std[2].exp().item()) == pytest.approx((0.5, 1.0))
    network = GAUSSIAN.build(**means, null_mean=[3.0], null_std=0.2).module
    assert (network.means[2].item(), network.log_std[2].exp().item()) == pytest.approx((3.0, 0.2))
    cond = Cond(label=torch.tensor([0, 1]))
    assert GAUSSIAN.null(network, cond)["label"].tolist() == [2, 2]


def test_data_has_the_moments_of_the_mixture():
    """Mean and variance over 100 k samples of class 0."""
    network = GAUSSIAN_MIXTURE.build(**PARTS).module
    data = network.data(torch.zeros(100_000, dtype=torch.long), torch.Generator().manual_seed(0))
    mean = 0.7 * -1 + 0.3 * 0.5
    var = 0.7 * (0.09 + 1) + 0.3 * (0.36 + 0.25) - mean**2
    assert data.mean().item() == pytest.approx(mean, abs=0.01)
    assert data.var().item() == pytest.approx(var, rel=0.02)


@pytest.mark.parametrize(
    "name, build",
    [("gaussian", {"means": [[1.0, 0.0]], "std": [0.5]}), ("gaussian_mixture", PARTS), ("mlp", {"width": 8})],
)
def test_folder_is_recognised_and_gives_the_same_network(tmp_path, name, build):
    """save, then open_model without saying which family."""
    family = FAMILIES.get(name)
    loaded = family.build(**build)
    with torch.no_grad():
        next(loaded.module.parameters()).add_(0.1)
    family.save(loaded.module, tmp_path)
    again = open_model(tmp_path)
    assert again.family == name and type(again.module) is type(loaded.module)
    x, label = torch.randn(4, *family.row_shape(loaded.module)), torch.zeros(4, dtype=torch.long)
    t = torch.full((4,), 300.0)
    assert torch.equal(again.module(x, t, label), loaded.module(x, t, label))


def test_folder_with_missing_or_wrong_weights_is_refused(tmp_path):
    """Each mistake is one line."""
    MLP.save(MLP.build(width=8).module, tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"width": 8', '"width": 9'))
    with pytest.raises(UserError, match=r"does not fit config\.json"):
        MLP.load(tmp_path)
    (tmp_path / "transformer" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        MLP.load(tmp_path)


@pytest.mark.parametrize(
    "name, build, message",
    [
        ("gaussian", {"means": [[0.0]], "std": [1.0, 2.0]}, "one entry a class"),
        ("gaussian_mixture", {"means": [[0.0, 0.0]], "std": [1.0], "weights": [[0.5, 0.5]]}, "one entry a part"),
        ("mlp", {"widht": 3}, "did you mean 'width'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(name, build, message):
    with pytest.raises(UserError, match=message):
        FAMILIES.get(name).build(**build)


def test_mlp_takes_adapters_on_its_hidden_layers():
    """lora.targets default and wide name layers of the MLP."""
    network = MLP.build(width=8, depth=3).module
    assert isinstance(network, MLPNet)
    assert len(Adapter(network, 2, 2.0, MLP.lora_targets("default")).down) == 3
    assert len(Adapter(network, 2, 2.0, MLP.lora_targets("wide")).down) == 6
