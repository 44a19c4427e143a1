"""The Triton kernels as far as a machine without a GPU shows them: they compile for one, and the interpreter runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ARGUMENTS = {
    "_compare": {"z": "*{}", "y": "*{}", "value": "*fp32", "n": "i32"}
    | dict.fromkeys(("inv_t", "beta", "log_beta", "log_rest"), "fp32"),
    "_lse": {"z": "*{}", "out": "*fp32", "n": "i32", "inv_t": "fp32"},
    "_spread": {"z": "*{}", "lse": "*fp32", "mass": "*fp32", "n": "i32", "inv_t": "fp32"},
}
INSIDE = {"_compare": {"INTERP": False}, "_lse": {}, "_spread": {"INTERP": False}}


@pytest.mark.slow
def test_the_kernels_equal_the_reference_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreted.py")]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no compiler")
@pytest.mark.parametrize(
    ("name", "kind", "arch"),
    [
        ("_compare", 2, 90),
        ("_lse", None, 90),
        ("_spread", None, 90),
        *(pytest.param("_compare", *case, marks=pytest.mark.slow) for case in ((0, 90), (1, 90), (2, 80))),
    ],
)
def test_the_kernels_compile_for_a_gpu(name, kind, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from fewstep_kernels.distillation import rows
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    fixed = {"BLOCK": rows.BLOCK} | INSIDE[name] | ({} if kind is None else {"KIND": kind})
    types = {key: value.format("bf16") for key, value in ARGUMENTS[name].items()} | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(getattr(rows, name), types, fixed)
    made = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": rows.WARPS})
    assert f".target sm_{arch}" in made.asm["ptx"] and made.asm["cubin"]
