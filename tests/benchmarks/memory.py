"""Peak memory of Decoupled DMD with two adapters on one base, against plain LoRA fine-tuning and three full copies.

    python tests/benchmarks/memory.py

Each case runs in a process of its own on a 57 M-parameter UNet2DModel (32 x 32, batch 4); peak resident memory above
what the process held before the networks were built.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = {
    "sample_size": 32,
    "channels": 3,
    "classes": 10,
    "block_out_channels": [192, 384],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
LORA = {"tune": "lora", "lora": {"rank": 16, "targets": "wide"}}
FULL = {"tune": "full"}
TEACHER = {"from": "unet2d", "build": BUILD}
TRAIN = {"steps": 3, "batch": 4, "log_every": 1}
LABELS = {"train": {"source": "labels", "classes": 10}}
CASES = {
    "two adapters on one base": ("decoupled_dmd", {"teacher": TEACHER, "student": LORA, "fake_score": LORA}),
    "plain LoRA fine-tuning": ("plain_lora", {"student": {**TEACHER, **LORA}}),
    "three full copies": ("decoupled_dmd", {"teacher": TEACHER, "student": FULL, "fake_score": FULL}),
}


def peak() -> float:
    """Peak resident megabytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(case: str) -> float:
    """Megabytes above the start for three steps of one case."""
    import torch

    from fewstep.data.batch import Cond
    from fewstep.engine.trainer import Trainer
    from fewstep.methods.base import Update
    from fewstep.methods.diffusion.flow_matching import FlowMatching
    from fewstep.methods.registry import METHODS
    from fewstep.recipe import load_recipe

    class PlainLora(FlowMatching):
        """Flow matching on noise images: what LoRA fine-tuning computes."""

        def train_step(self, batch, draw):
            x0, eps, t = (
                draw.normal("x0", *self.student.row_shape),
                draw.normal("eps", *self.student.row_shape),
                draw.uniform("t"),
            )
            yield Update(
                "student", {"denoise": self.student.denoising_loss(x0, eps, t, Cond(label=batch.cond["label"]))}
            )

    sys.modules["fewstep_benchmark"] = sys.modules[__name__]
    sys.modules[__name__].PlainLora = PlainLora  # type: ignore[attr-defined]
    METHODS.table["plain_lora"] = "fewstep_benchmark:PlainLora"
    torch.zeros(1).add(1)
    method, roles = CASES[case]
    before = peak()
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(
            load_recipe({"method": method, **roles, "data": LABELS, "train": TRAIN}), Path(place, "run"), show=False
        )
        trainer.save = lambda: None  # type: ignore[method-assign]
        trainer.run()
    return peak() - before


def main() -> None:
    """Prints megabytes and ratios."""
    if len(sys.argv) > 1:
        print(json.dumps(run(sys.argv[1])))
        return
    used = {}
    for case in CASES:
        done = subprocess.run(
            [sys.executable, __file__, case], capture_output=True, text=True, check=True, env=dict(os.environ)
        )
        used[case] = json.loads(done.stdout.splitlines()[-1])
    for case, megabytes in used.items():
        print(f"{case:28s} {megabytes:7.0f} MB  {megabytes / used['plain LoRA fine-tuning']:.2f} x plain LoRA")


if __name__ == "__main__":
    main()
