"""Steps a second of the trainer against a hand-written loop of the same method, on the demo's network.

    python tests/benchmarks/trainer_overhead.py [--rounds 5] [--steps 40]

Both run Decoupled DMD with two adapters on one base, `fake_updates: 3`, batch 64, in turn and on equal levels; the median
of the paired ratios is printed. Above 1 the trainer is slower.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fewstep.draws import Draw
from fewstep.engine.trainer import Trainer
from fewstep.nets.lora import use
from fewstep.recipe import load_recipe
from fewstep.resources import config
from fewstep.roles import Handle, assemble

RECIPE = config("decoupled_dmd/digits.yaml")
PLAIN = [
    "config.fake_per_level=false",
    "config.steps=[1,2,4]",
    "config.guidance_scale=1",
    "train.save_every=null",
    "preview=null",
]
SIZES = (1, 2, 4)


def turns(steps: int) -> list[tuple[int, int]]:
    """(grid size, level) of each barrier, as the trainer draws them: both do the same work."""
    found = []
    for step in range(steps):
        draw = Draw(0, step, [0], scope="train")
        n = SIZES[draw.integers("grid", len(SIZES), per="step")]
        found.append((n, draw.integers("level", n, per="step")))
    return found


def by_hand(handles: dict[str, Handle], steps: int, batch: int = 64, fake_updates: int = 3) -> float:
    """Seconds for `steps` barriers of the plainest loop one would write."""
    base, student, fake = handles["teacher"].module, handles["student"].adapter, handles["fake_score"].adapter
    optimizers = {
        who: torch.optim.AdamW(who.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        for who in (student, fake)
    }
    averaged = [p.detach().clone() for p in student.parameters()]

    def x0(who, x, t, label):
        with use(who):
            return x - t[:, None, None, None] * base(x, (1000 * t).floor(), class_labels=label).sample

    places = turns(steps)
    began = time.perf_counter()
    for step, (n, level) in enumerate(places):
        label = torch.randint(0, 10, (batch,))
        x, grid = torch.randn(batch, 1, 8, 8), [0.999 * (1 - i / n) for i in range(n)]
        with torch.no_grad():
            for a, b in list(itertools.pairwise(grid))[:level]:
                x = x + (b - a) * (x - x0(student, x, torch.full((batch,), a), label)) / a
        turn = step % (fake_updates + 1) == 0
        with torch.set_grad_enabled(turn):
            made = x0(student, x, torch.full((batch,), grid[level]), label)
        who = student if turn else fake
        if turn:
            with torch.no_grad():
                t = torch.rand(batch).clamp(0.02, 0.98)
                noised = made + t[:, None, None, None] * (torch.randn_like(made) - made)
                real = x0(None, noised, t, label)
                scale = (made - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)
                target = made + (real - x0(fake, noised, t, label)) / scale
            loss = 0.5 * (made - target).square().mean()
        else:
            t, eps = torch.rand(batch), torch.randn_like(made)
            noised = made + t[:, None, None, None] * (eps - made)
            with use(fake):
                v = base(noised, (1000 * t).floor(), class_labels=label).sample
            loss = (v - (eps - made)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(who.parameters(), 1.0)
        optimizers[who].step()
        optimizers[who].zero_grad()
        if turn:
            torch._foreach_lerp_(averaged, [p.detach() for p in student.parameters()], 0.02)
    return time.perf_counter() - began


def by_trainer(folder: Path, steps: int) -> float:
    """Seconds for `steps` barriers of the trainer, logging every 20th, without checkpoints and previews."""
    said = load_recipe(RECIPE, [f"train.steps={steps}", *PLAIN])
    trainer = Trainer(said, folder, show=False)
    trainer.save = lambda: None  # type: ignore[method-assign]
    began = time.perf_counter()
    trainer.run()
    return time.perf_counter() - began


def main() -> None:
    """Prints one ratio a round and their median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    recipe = load_recipe(RECIPE, PLAIN)
    handles = assemble(recipe.build_method().roles(), recipe.roles, seed=0)
    ratios = []
    with tempfile.TemporaryDirectory() as place:
        by_hand(handles, 8)
        by_trainer(Path(place, "warm"), 8)
        for i in range(asked.rounds):
            plain, ours = by_hand(handles, asked.steps), by_trainer(Path(place, str(i)), asked.steps)
            ratios.append(ours / plain)
            print(
                f"round {i}: by hand {asked.steps / plain:.2f}/s, trainer {asked.steps / ours:.2f}/s, time ratio {ratios[-1]:.3f}"
            )
    print(f"median time ratio {statistics.median(ratios):.3f} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
