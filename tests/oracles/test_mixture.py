"""Decoupled DMD with a small network: a one-step student learns a 2-D mixture from its closed-form teacher."""

from __future__ import annotations

import copy

import pytest
import torch

from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD
from fewstep.methods.diffusion.sid import SiD
from fewstep.models.oracle import GAUSSIAN_MIXTURE, MLP, MixtureNet
from tests.oracles.harness import batch, samples, seat, sliced_wasserstein2, train

ROWS, PRETRAINING, GENERATOR_STEPS, FAKE_UPDATES = 512, 800, 500, 3
PARTS = {"means": [[-0.6, -0.2], [0.6, 0.3]], "std": [0.55, 0.4], "weights": [[0.6, 0.4]]}


def copy_of(teacher: MixtureNet, generator: torch.Generator, width: int = 64, depth: int = 3) -> torch.nn.Module:
    """An MLP fitted to the teacher's velocity: what a student is initialised from."""
    torch.manual_seed(0)
    network, label = MLP.build(width=width, depth=depth).module, torch.zeros(ROWS, dtype=torch.long)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAINING)
    for _ in range(PRETRAINING):
        t, eps = torch.rand(ROWS, generator=generator), torch.randn(ROWS, 2, generator=generator)
        x = (1 - t)[:, None] * teacher.data(label, generator) + t[:, None] * eps
        with torch.no_grad():
            target = teacher(x, 1000 * t, label)
        optimizer.zero_grad()
        (network(x, 1000 * t, label) - target).square().mean().backward()
        optimizer.step()
        decay.step()
    return network


def distilled(
    teacher: MixtureNet, network: torch.nn.Module, truth: torch.Tensor, steps: int, per_level: bool
) -> list[float]:
    """Sliced W2 to the truth, in units of its std, of what the student's last level makes: before and after training."""
    config = {"steps": steps, "guidance_scale": 1.0, "fake_updates": FAKE_UPDATES, "fake_per_level": per_level}
    method = DecoupledDMD(DecoupledDMD.Config(**config))
    fakes = {name: copy.deepcopy(network) for name in method.fakes}
    seat(method, {"teacher": teacher, "student": copy.deepcopy(network), **fakes})
    rates = {"student": 1e-3, **dict.fromkeys(method.fakes, 3e-3)}
    optimizers = {n: torch.optim.Adam(getattr(method, n).module.parameters(), r, (0.5, 0.99)) for n, r in rates.items()}
    length = GENERATOR_STEPS * steps
    fade = torch.optim.lr_scheduler.LinearLR(optimizers["student"], 1.0, 0.01, length)

    def distance() -> float:
        made = samples(method, method.schedule(), len(truth))
        return sliced_wasserstein2(made, truth) / truth.var(0).mean().sqrt().item()

    def after(_, update):
        if update.role_names == ("student",):
            fade.step()

    before = distance()
    train(method, range(length * (FAKE_UPDATES + 1)), lambda _: batch(ROWS), optimizers, after)
    return [before, distance()]


@pytest.mark.slow
def test_two_levels_with_a_fake_each_reach_the_mixture_and_with_a_shared_one_do_not():
    """D_DM knows the fake alone, so one fake for two levels only makes the mixture over both levels match."""
    generator = torch.Generator().manual_seed(3)
    teacher = GAUSSIAN_MIXTURE.build(**PARTS).module
    truth = teacher.data(torch.zeros(20_000, dtype=torch.long), generator)
    network = copy_of(teacher, generator)
    shared = distilled(teacher, network, truth, steps=2, per_level=False)[1]
    own = distilled(teacher, network, truth, steps=2, per_level=True)[1]
    assert own < 0.08 < shared


def test_one_step_student_reaches_a_mixture_within_5_percent_of_its_std():
    """alpha = 1: sliced W2 from 1.2 std (the teacher in one step) to below 0.05 (two true sets are 0.018 apart)."""
    generator = torch.Generator().manual_seed(3)
    teacher = GAUSSIAN_MIXTURE.build(**PARTS).module
    truth = teacher.data(torch.zeros(20_000, dtype=torch.long), generator)
    network = copy_of(teacher, generator)
    before, after = distilled(teacher, network, truth, steps=1, per_level=False)
    assert before > 1
    assert after < 0.05


def sid_distance(teacher: MixtureNet, network: torch.nn.Module, truth: torch.Tensor, alpha: float) -> float:
    """Sliced W2 to the truth, in units of its std, of a one-step student of SiD."""
    method = SiD(SiD.Config(alpha=alpha, fake_updates=FAKE_UPDATES, weights={"sid": 1.0}))
    seat(method, {"teacher": teacher, "student": copy.deepcopy(network), "fake_score": copy.deepcopy(network)})
    rates = {"student": 1e-3, "fake_score": 3e-3}
    optimizers = {n: torch.optim.Adam(getattr(method, n).module.parameters(), r, (0.5, 0.99)) for n, r in rates.items()}
    fade = torch.optim.lr_scheduler.LinearLR(optimizers["student"], 1.0, 0.01, GENERATOR_STEPS)

    def after(_, update):
        if update.role_names == ("student",):
            fade.step()

    train(method, range(GENERATOR_STEPS * FAKE_UPDATES), lambda _: batch(ROWS), optimizers, after)
    made = samples(method, method.schedule(), len(truth))
    return sliced_wasserstein2(made, truth) / truth.var(0).mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_score_identity_distillation_reaches_a_mixture(alpha):
    """From 1.2 std (the teacher in one step) to a twentieth, whichever way the two forms of the loss are mixed."""
    generator = torch.Generator().manual_seed(3)
    teacher = GAUSSIAN_MIXTURE.build(**PARTS).module
    truth = teacher.data(torch.zeros(20_000, dtype=torch.long), generator)
    assert sid_distance(teacher, copy_of(teacher, generator), truth, alpha) < 0.05
