"""A method written by a stranger: one small file and an entry point, trained and exported through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

METHOD = """
from fewstep.maths.solvers import Schedule
from fewstep.methods.base import DiffusionMethod, Update
from fewstep.roles import Role


class Plain(DiffusionMethod):
    name = "plain_flow"

    def roles(self):
        return (Role("student", tune="full"),)

    def train_step(self, batch, draw):
        eps, t = draw.normal("eps", *batch.x0.shape[1:]), draw.uniform("t")
        yield Update("student", {"denoise": self.student.denoising_loss(batch.x0, eps, t, batch.cond)})

    def schedule(self):
        return Schedule("ode", self.student.path.grid(2))
"""
RECIPE = """
method: plain_flow
student: {from: unet2d, build: {sample_size: 8, classes: 10, block_out_channels: [8, 16], norm_num_groups: 4}}
data: {train: {source: digits}}
train: {steps: 3, batch: 8, log_every: 1}
"""


def test_a_method_from_another_package_trains_and_exports(tmp_path):
    (tmp_path / "stranger.py").write_text(METHOD)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fewstep.methods]\nplain_flow = stranger:Plain\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "fewstep", "train", "recipe.yaml", "--out", "run", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)
    assert (tmp_path / "run" / "checkpoints" / "step-3" / "student.role.safetensors").is_file()
    card = json.loads((tmp_path / "run" / "model" / "fewstep.json").read_text())
    assert card["method"] == "plain_flow" and card["training_steps"] == 3
