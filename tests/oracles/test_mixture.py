"""Decoupled DMD with a small network: a one-step student learns a 2-D mixture from its closed-form teacher."""

from __future__ import annotations

import copy

import torch

from fewstep.methods.diffusion.decoupled_dmd import DecoupledDMD
from fewstep.models.oracle import GAUSSIAN_MIXTURE, MLP, MixtureNet
from tests.oracles.harness import batch, samples, seat, sliced_wasserstein2, train

ROWS, PRETRAINING, GENERATOR_STEPS, FAKE_UPDATES = 512, 800, 500, 3
PARTS = {"means": [[-0.6, -0.2], [0.6, 0.3]], "std": [0.55, 0.4], "weights": [[0.6, 0.4]]}


def copy_of(teacher: MixtureNet, generator: torch.Generator) -> torch.nn.Module:
    """An MLP fitted to the teacher's velocity: what a student is initialised from."""
    torch.manual_seed(0)
    network, label = MLP.build(width=64, depth=3).module, torch.zeros(ROWS, dtype=torch.long)
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


def test_one_step_student_reaches_a_mixture_within_5_percent_of_its_std():
    """alpha = 1: sliced W2 from 1.2 std (the teacher in one step) to below 0.05 (two true sets are 0.018 apart)."""
    generator = torch.Generator().manual_seed(3)
    teacher = GAUSSIAN_MIXTURE.build(**PARTS).module
    truth = teacher.data(torch.zeros(20_000, dtype=torch.long), generator)
    network = copy_of(teacher, generator)
    method = DecoupledDMD(DecoupledDMD.Config(steps=1, guidance_scale=1.0, fake_updates=FAKE_UPDATES))
    seat(method, {"teacher": teacher, "student": network, "fake_score": copy.deepcopy(network)})

    def distance() -> float:
        std = truth.var(0).mean().sqrt().item()
        return sliced_wasserstein2(samples(method, method.schedule(), len(truth)), truth) / std

    assert distance() > 1
    rates = {"student": 1e-3, "fake_score": 3e-3}
    optimizers = {n: torch.optim.Adam(getattr(method, n).module.parameters(), r, (0.5, 0.99)) for n, r in rates.items()}
    fade = torch.optim.lr_scheduler.LinearLR(optimizers["student"], 1.0, 0.01, GENERATOR_STEPS)

    def after(_, update):
        if update.role_names == ("student",):
            fade.step()

    train(method, range(GENERATOR_STEPS * (FAKE_UPDATES + 1)), lambda _: batch(ROWS), optimizers, after)
    assert distance() < 0.05
