"""The Triton kernels on a CPU: the variable that asks for the interpreter must be set before Triton is imported anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PARTS = {
    "shapes": "masks or grouped or strides or missing or alone",
    "numbers": "dims or bits or cancels",
}


@pytest.mark.parametrize("part", PARTS)
def test_the_kernels_agree_with_float64_in_the_interpreter(part):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", PARTS[part]]
    done = subprocess.run(
        [*command, "tests/kernels/attention/interpreted.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
