"""Images a second of our streaming FID against torch-fidelity's, on the CPU, with one batch size and one set of weights.

    python -m tests.benchmarks.fid_throughput [--rounds 5] [--images 16] [--side 256] [--batch 8]

A round runs both in turn on one folder of PNG files: decoding, resizing, network, statistics. Weights are random. The
distance itself is timed apart, once, as it does not depend on the number of images. The median of the paired ratios is
printed. Above 1 ours is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from torch_fidelity import metric_fid
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

from fewstep.evaluation.fid import frechet_distance
from fewstep.evaluation.inception import InceptionFeatures
from fewstep.evaluation.stream import folder_moments
from tests.evaluation.random_inception import random_extractor, write_weights


def pictures(folder: Path, n: int, side: int) -> Path:
    """n PNG files of coarse noise."""
    folder.mkdir()
    draw = np.random.default_rng(n)
    for i in range(n):
        coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
    return folder


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("images", 16), ("side", 256), ("batch", 8)):
        asked.add_argument(f"--{name}", type=int, default=default)
    said = asked.parse_args()
    with tempfile.TemporaryDirectory() as held, torch.no_grad():
        weights = write_weights(random_extractor(), Path(held))
        folder = pictures(Path(held) / "images", said.images, said.side)
        compare(folder, weights, said.rounds, said.batch)


def compare(folder: Path, weights: Path, rounds: int, batch: int) -> None:
    """Prints both rates, their ratio, and the seconds of one distance."""
    ours = InceptionFeatures(weights)
    options = {"feature_extractor_weights_path": str(weights), "cuda": False, "verbose": False}
    extractor = create_feature_extractor("inception-v3-compat", ["2048"], **options)
    held: dict[str, object] = {}

    def run_ours() -> None:
        held["ours"] = folder_moments(folder, ours, rows=batch)

    def run_theirs() -> None:
        said = extract_featuresdict_from_input_id(
            1, extractor, input1=str(folder), batch_size=batch, save_cpu_ram=True, **options
        )
        held["theirs"] = metric_fid.fid_features_to_statistics(said["2048"])

    run_ours(), run_theirs()  # first calls choose kernels
    times = [(seconds(run_ours), seconds(run_theirs)) for _ in range(rounds)]
    n = len(list(folder.iterdir()))
    for name, column in zip(("fewstep", "torch-fidelity"), zip(*times)):
        print(f"{name:<15}{n / statistics.median(column):6.2f} images/s")
    ratios = sorted(theirs / mine for mine, theirs in times)
    print(f"ratio          {statistics.median(ratios):6.2f}   from {ratios[0]:.2f} to {ratios[-1]:.2f}, {rounds} pairs")
    a, b = held["ours"], held["theirs"]
    print(
        f"one distance   {seconds(lambda: frechet_distance(a, a)):6.1f} s, torch-fidelity's "
        f"{seconds(lambda: metric_fid.fid_statistics_to_metric(b, b, False)):.1f} s"
    )


if __name__ == "__main__":
    main()
