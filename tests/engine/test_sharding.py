"""FSDP2 on two processes without a GPU: the same run as on one, whole checkpoints, and whole exports."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fewstep.engine import checkpoint
from fewstep.engine.sharding import _blocks
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.models.folder import open_model
from fewstep.recipe import load_recipe

from . import toy

ROOT = Path(__file__).resolve().parents[2]
DIT = {
    "from": "dit",
    "build": {
        "sample_size": 8,
        "channels": 1,
        "classes": 10,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
    },
}
SGD = {"name": "sgd", "momentum": 0.9, "lr": 0.05}


def recipe(tune: str, **train: Any) -> dict[str, Any]:
    """Decoupled DMD of a small transformer; gradient descent, since Adam's first steps make rounding errors large."""
    return {
        "method": "decoupled_dmd",
        "teacher": DIT,
        "student": {"tune": tune, "optimizer": SGD, "ema": 0.9},
        "fake_score": {"tune": tune, "optimizer": SGD},
        "config": {"fake_updates": 1, "steps": [1, 2]},
        "data": {"train": {"source": "labels", "classes": 10}},
        "train": {"steps": 6, "batch": 8, "log_every": 1, "save_every": 3, **train},
    }


def on_two_processes(said: dict[str, Any], folder: Path, *arguments: str) -> None:
    """`torchrun -m fewstep train`; fails with what the processes wrote."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(said))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    train = ["-m", "fewstep", "train", str(file), "--out", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *launch, *train], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def files(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of a checkpoint."""
    return checkpoint.load(run / "checkpoints" / f"step-{step}").files


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_processes_with_parts_equal_one(tmp_path, tune):
    """Networks, averages and moments to 1e-5, after a resume too, and the exported network."""
    alone = Trainer(load_recipe(recipe(tune)), tmp_path / "one", show=False)
    alone.run()
    parts = recipe(tune, shard=True, check_export=False)
    on_two_processes(parts, tmp_path / "two")
    assert checkpoint.newest(tmp_path / "two" / "checkpoints").state["processes"] == 2
    for step in (3, 6):
        one, two = files(tmp_path / "one", step), files(tmp_path / "two", step)
        assert one.keys() == two.keys() and {"student.role", "student.ema", "fake_score.optimizer"} <= one.keys()
        for file, tensors in one.items():
            assert tensors.keys() == two[file].keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(two[file][name], tensor, rtol=1e-5, atol=1e-5)
    exported = open_model(tmp_path / "two" / "model").module.state_dict()
    with alone.handles["student"].averaged():
        trained = alone.method.exported_module().state_dict()
    assert exported.keys() == trained.keys()
    assert all(torch.allclose(exported[name], trained[name], rtol=0, atol=1e-5) for name in trained)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_parts(tmp_path):
    """As one that was never stopped."""
    said = recipe("full", shard=True, check_export=False)
    on_two_processes(said, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step-6")
    shutil.rmtree(tmp_path / "halves" / "model")
    on_two_processes(said, tmp_path / "halves", "--resume")
    one, two = files(tmp_path / "whole", 6), files(tmp_path / "halves", 6)
    assert all(torch.equal(one[file][name], two[file][name]) for file in one for name in one[file])
    steps = [json.loads(line)["step"] for line in (tmp_path / "halves" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_one_process_has_nothing_to_cut(tmp_path):
    """The error names the launcher."""
    with pytest.raises(UserError, match="accelerate launch"):
        Trainer(load_recipe(recipe("full", shard=True)), tmp_path / "run", show=False)


def test_previews_of_parts_are_refused(tmp_path):
    """Before anything waits for another process."""
    with pytest.raises(UserError, match="remove `preview`"):
        Trainer(load_recipe({**recipe("full", shard=True), "preview": {"every": 2}}), tmp_path / "run", show=False)


def test_blocks_are_the_members_of_the_outermost_lists():
    """A UNet's or a transformer's blocks, not the parts of blocks."""
    net = torch.nn.ModuleDict(
        {
            "head": torch.nn.Linear(2, 2),
            "layers": torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3)]),
            "inner": torch.nn.ModuleDict({"more": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Identity()])}),
        }
    )
    assert [type(block).__name__ for block in _blocks(net)] == ["Sequential"] * 2


@pytest.mark.parametrize(
    ("name", "engine"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_launch_files_of_other_engines_are_refused_with_what_to_write(monkeypatch, tmp_path, name, engine):
    """They would be started and then not used."""
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=rf"{engine}.*train\.shard=true"):
        toy.trained(toy.recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
