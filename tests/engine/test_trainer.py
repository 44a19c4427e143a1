"""The trainer's promises: resume is exact, the cut into micro-batches and processes does not matter, faults are named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fewstep.engine import checkpoint
from fewstep.errors import RunFailed, UserError

from . import toy

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("method", ["toy_denoise", "toy_game"])
def test_a_run_in_two_halves_equals_one_run(tmp_path, method):
    whole = toy.trained(toy.recipe(method, steps=12, save_every=6), tmp_path / "whole")
    halves = toy.Trainer(toy.load_recipe(toy.recipe(method, steps=12, save_every=6)), tmp_path / "halves", show=False)
    save, kept = halves.save, []

    def stop_after_first_save():
        save()
        kept.append(halves.total)
        raise KeyboardInterrupt

    halves.save = stop_after_first_save
    with pytest.raises(KeyboardInterrupt):
        halves.run()
    assert kept == [6]
    resumed = toy.trained(toy.recipe(method, steps=12, save_every=6), tmp_path / "halves", resume=True)
    assert toy.hashes(resumed) == toy.hashes(whole)
    assert len(toy.hashes(whole)) >= 4


def test_sigkill_at_any_moment_then_resume_gives_the_same_weights(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.engine import toy; from pathlib import Path\n"
        "toy.trained(toy.recipe('toy_denoise', steps=40, save_every=5), Path(sys.argv[2]))\n"
    )
    run = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", script, str(ROOT), str(run)], env={**os.environ})
    deadline = time.monotonic() + 120
    while not checkpoint.steps(run / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = checkpoint.steps(run / "checkpoints")
    assert done and done[-1] < 40, "the child was to be killed in the middle"
    resumed = toy.trained(toy.recipe("toy_denoise", steps=40, save_every=5), run, resume=True)
    whole = toy.trained(toy.recipe("toy_denoise", steps=40, save_every=5), tmp_path / "whole")
    assert toy.hashes(resumed) == toy.hashes(whole)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "a resumed run must not log a step twice"


@pytest.mark.parametrize("method", ["toy_denoise", "toy_game"])
def test_eight_micro_batches_equal_one_batch(tmp_path, method):
    said = toy.recipe(method, steps=6)
    if method == "toy_game":
        said["student"]["optimizer"]["name"] = "sgd"
    one = toy.trained(said, tmp_path / "one")
    eight = toy.trained({**said, "train": {**said["train"], "micro_batch": 2}}, tmp_path / "eight")
    assert eight.cut.parts == 8
    if method == "toy_denoise":  # the game has dropout, whose masks do depend on the cut
        assert toy.largest_difference(one, eight) < 1e-5


def test_two_processes_equal_one(tmp_path):
    """Equal draws, parameters to 1e-5; launched with torchrun, and the process count is asserted."""
    script = tmp_path / "ranks.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os; os.environ['OMP_NUM_THREADS'] = '1'\n"
        "from pathlib import Path; from tests.engine import toy; from fewstep.engine import distributed\n"
        f"t = toy.trained(toy.recipe('toy_denoise', steps=6, save_every=6), Path({str(tmp_path / 'two')!r}))\n"
        "assert distributed.world() == 2, distributed.world()\n"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        port,
        str(script),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = toy.trained(toy.recipe("toy_denoise", steps=6, save_every=6), tmp_path / "one")
    two = checkpoint.newest(tmp_path / "two" / "checkpoints")
    assert two is not None and two.state["place"]["total"] == 6
    for name, value in one.handles["student"].state().items():
        torch.testing.assert_close(two.files["student.role"][name], value, rtol=0, atol=1e-5)
    assert toy.logged(tmp_path / "two") == [approx(line) for line in toy.logged(tmp_path / "one")]


def test_resume_with_another_cut_is_allowed(tmp_path):
    said = toy.recipe("toy_denoise", steps=4, save_every=2)
    toy.trained(said, tmp_path / "run")
    again = toy.trained(
        {**said, "train": {**said["train"], "micro_batch": 4, "log_every": 1}}, tmp_path / "run", resume=True
    )
    assert again.total == 4


def test_resume_with_another_recipe_names_the_field(tmp_path):
    said = toy.recipe("toy_denoise", steps=2, save_every=2)
    toy.trained(said, tmp_path / "run")
    said["train"]["seed"] = 5
    with pytest.raises(UserError, match=r"train\.seed was None and is 5"):
        toy.trained(said, tmp_path / "run", resume=True)


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_been_meant_to_but_not_to_fewer(tmp_path):
    def said(steps):
        recipe = toy.recipe("toy_denoise", steps=steps, save_every=3)
        recipe["student"]["optimizer"]["decay"] = "constant"
        return recipe

    toy.trained(said(6), tmp_path / "longer")
    longer = toy.trained(said(12), tmp_path / "longer", resume=True)
    whole = toy.trained(said(12), tmp_path / "whole")
    assert longer.total == 12 and toy.hashes(longer) == toy.hashes(whole)
    assert toy.load_recipe(tmp_path / "longer" / "recipe.yaml").train.steps == 12
    with pytest.raises(UserError, match=r"train\.steps was 12 and is 6"):
        toy.trained(said(6), tmp_path / "longer", resume=True)


def test_a_run_folder_is_not_overwritten(tmp_path):
    toy.trained(toy.recipe("toy_denoise", steps=2, save_every=2), tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        toy.trained(toy.recipe("toy_denoise", steps=2), tmp_path / "run")


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    said = toy.recipe("toy_game", steps=6, save_every=4, log_every=2)
    said["config"] = {"nan_at": 7}
    with pytest.raises(RunFailed, match=r"is nan at step 8\. The last good checkpoint is .*step-4"):
        toy.trained(said, tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4], "a NaN must never be saved"


def test_a_weight_of_zero_switches_a_term_off_even_when_it_is_nan(tmp_path):
    said = toy.recipe("toy_game", steps=2)
    said["config"] = {"nan_at": 0, "weights": {"ce": 0}}
    said["guards"] = {"grad_norm": None}
    trainer = toy.Trainer(toy.load_recipe(said), tmp_path / "run", show=False)
    before = {n: t.clone() for n, t in trainer.handles["student"].state().items()}
    with pytest.raises(RunFailed, match="is nan at step"):
        trainer.run()
    assert all(torch.isfinite(t).all() for t in trainer.handles["student"].state().values())
    assert before.keys() == trainer.handles["student"].state().keys()


def test_sigterm_finishes_the_step_saves_and_prints_how_to_go_on(tmp_path):
    trainer = toy.Trainer(toy.load_recipe(toy.recipe("toy_denoise", steps=50)), tmp_path / "run", show=False)
    step = trainer._step

    def step_then_signal(stage):
        step(stage)
        if trainer.total == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._step = step_then_signal
    with pytest.raises(RunFailed, match=r"stopped by SIGTERM after step 3; go on with: fewstep train .*--resume"):
        trainer.run()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3]


def test_batches_that_cannot_be_cut_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.batch=16 cannot be cut into micro-batches of 5"):
        toy.trained(toy.recipe("toy_denoise", micro_batch=5), tmp_path / "run")


def test_a_missing_source_is_named(tmp_path):
    said = toy.recipe("toy_denoise")
    said["data"] = {}
    with pytest.raises(UserError, match=r"has no data\.train"):
        toy.trained(said, tmp_path / "run")


def test_kept_rows_are_stored_under_their_samples(tmp_path):
    trainer = toy.trained(toy.recipe("toy_game", steps=2, batch=16), tmp_path / "run")
    store = trainer.stores["outputs"]
    assert 16 < len(store) <= 12 * 16 and store.read(store.ids()[:3])["logits"].shape == (3, 10)


def test_the_second_stage_has_its_own_length_rate_and_log_name(tmp_path):
    trainer = toy.trained(toy.recipe("toy_game", steps=4, log_every=1), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["first"] * 10 + ["second"] * 4
    assert trainer.total == 14 and trainer.optimizers["student"].factor == 0.5


def test_previews_and_guards_stop_a_collapsed_student(tmp_path):
    said = toy.recipe("toy_denoise", steps=6)
    said |= {"preview": {"every": 1, "n": 8}, "guards": {"diversity": 0.5, "patience": 1}}
    trainer = toy.Trainer(toy.load_recipe(said), tmp_path / "run", show=False)
    samples = trainer.method.samples
    trainer.method.samples = lambda n, seed: samples(n, seed) * (1.0 if trainer.total < 3 else 0.01)
    with pytest.raises(RunFailed, match=r"the std of generated samples went from .* at step 3"):
        trainer.run()
    assert len(list((tmp_path / "run" / "previews").glob("*.png"))) == 3


def test_further_pictures_are_saved_beside_the_samples(tmp_path):
    said = toy.recipe("toy_denoise", steps=4) | {"preview": {"every": 2, "n": 8}}
    trainer = toy.Trainer(toy.load_recipe(said), tmp_path / "run", show=False)
    trainer.method.pictures = lambda n, seed: {"negative time": trainer.method.samples(n, seed)}
    trainer.run()
    previews = tmp_path / "run" / "previews"
    files = {str(f.relative_to(previews)) for f in previews.rglob("*.png")}
    names = {f"step-{step:06d}.png" for step in (2, 4)}
    assert files == names | {f"negative-time/{name}" for name in names}


def test_losses_by_noise_level_do_not_depend_on_the_cut(tmp_path):
    said = toy.recipe("toy_denoise", steps=6, log_every=2)
    toy.trained(said, tmp_path / "one")
    toy.trained({**said, "train": {**said["train"], "micro_batch": 2}}, tmp_path / "eight")
    one, eight = toy.logged(tmp_path / "one"), toy.logged(tmp_path / "eight")
    assert all(any(name.startswith("level.denoise.") for name in line) for line in one)
    assert [approx(line) for line in one] == eight


def test_a_resumed_run_logs_noise_levels_as_an_unbroken_one(tmp_path):
    said = toy.recipe("toy_denoise", steps=6, save_every=2)
    toy.trained(said, tmp_path / "run")
    whole = toy.logged(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    toy.trained(said, tmp_path / "run", resume=True)
    assert [line["step"] for line in whole] == [2, 4, 6] and toy.logged(tmp_path / "run") == whole


def approx(line):
    return {name: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for name, value in line.items()}
