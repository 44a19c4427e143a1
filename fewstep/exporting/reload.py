"""The proof at the end of an export: a fresh process that has only diffusers makes the trainer's own samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RunFailed, UserError
from ..models.folder import card
from . import fresh
from .guidance_number import guidance_number

TOLERANCE = 1e-4
# On DDPM tables the first x0 = (x - sigma eps) / alpha divides by alpha = .068, and a decoder's hundred layers follow, so
# that sums taken in another order (another device) are seen at 1e-4; a wrong level or guidance at 1e-2.
DECODED_TOLERANCE = 1e-3
# Chains are nanometres, and low noise divides by t: other sums were seen at 1e-5. A network that puts distances into bins
# jumps where one lies on an edge, so single chains were seen at 1e-3; of a wrong level all are off by .05.
CHAIN_TOLERANCE = 5e-4
ALIKE = 0.75  # of the chains


def reload_check(
    folder: str | Path,
    expected: Tensor,
    latents: Tensor,
    labels: Tensor | None = None,
    renoise: Sequence[Tensor] = (),
    prompts: Sequence[str] | None = None,
    further: Mapping[int, Tensor] | None = None,
    lengths: Tensor | None = None,
    steps: int | None = None,
) -> float:
    """Largest absolute difference between `expected` and the samples of the reloaded folder; images both in 0..1.

    expected [n, channels, height, width] in [-1, 1], or chains [n, residues, 3], as `Method.samples` gives them;
    latents: unit noise they start from, of their shape; labels [n] int64; renoise: the noise added after level 1, 2, ...
    by the scheduler; prompts [n] of a text-to-image folder; further: what is expected at other numbers of steps;
    lengths [n] of chains; steps: of `expected`, default the folder's.
    Raises RunFailed when the folder does not load without fewstep, or the difference is 1e-4 or more (1e-3 where a VAE
    decodes); for chains the difference is that of the third quartile, over the largest coordinate if it is beyond 1 nm,
    and has to be less than 5e-4.
    """
    said = card(Path(folder))
    if not said.get("pipeline"):
        raise UserError(f"'{folder}' holds no pipeline that diffusers could load: nothing to compare")
    given = {f"noise.{i}": noise for i, noise in enumerate((latents, *renoise))}
    if labels is not None and said["classes"]:
        given["labels"] = labels
    if lengths is not None:
        given = {name: noise[:, : int(lengths.max())] for name, noise in given.items()} | {"lengths": lengths}
    further = further or {}
    counts = [steps or len(said["schedule"]["u"]), *further]
    samples = fresh_samples(Path(folder), said, given, prompts, counts)
    expected = torch.cat([expected, *further.values()]).cpu().float()
    expected = (expected / 2 + 0.5).clamp(0, 1) if lengths is None else expected[:, : samples.shape[1]]
    apart = (expected - samples).abs().flatten(1).amax(1)
    if lengths is not None:  # in few steps of a teacher meant for hundreds a chain may be a hundred times too large
        apart = apart.quantile(ALIKE, interpolation="lower") / expected.abs().max().clamp_min(1)
    difference = apart.max().item()
    pixels = DECODED_TOLERANCE if (Path(folder) / "vae").is_dir() else TOLERANCE
    if not difference < (pixels if lengths is None else CHAIN_TOLERANCE):
        what = f"reloaded in a fresh process, its samples are off by {difference:.1e}"
        raise RunFailed(f"'{folder}' does not make the trained samples: {what}")
    return difference


def fresh_samples(
    folder: Path,
    said: Mapping[str, Any],
    given: Mapping[str, Tensor],
    prompts: Sequence[str] | None = None,
    steps: Sequence[int] = (),
) -> Tensor:
    """Images [n, channels, height, width] in 0..1, or chains, from a process of its own that cannot import fewstep.

    steps: numbers of steps, whose samples follow each other, [n len(steps), ...]; default the folder's own.
    """
    words = {
        "steps": json.dumps(list(steps) or [len(said["schedule"]["u"])]),
        "guidance": str(guidance_number(said["pipeline"], said["schedule"]["guidance"])),
        "trust": "yes" if said["remote_code"] else "no",
        "prompts": json.dumps(list(prompts) if said["prompts"] and prompts else None),
        "size": json.dumps(said.get("size")),
    }
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place, "request.safetensors"), Path(place, "answer.safetensors")
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}, request, words)
        command = [sys.executable, fresh.__file__, str(folder.resolve()), str(request), str(answer)]
        # The pipeline's file is copied to HF_MODULES_CACHE before it is run: not into the user's own cache.
        environment = {**os.environ, "HF_MODULES_CACHE": place, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunFailed(f"'{folder}' does not run in a fresh process that has only diffusers: {last}")
        with safe_open(answer, "pt") as file:
            return file.get_tensor("samples").to(torch.float32)
