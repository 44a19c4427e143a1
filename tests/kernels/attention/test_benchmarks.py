"""The benchmark scripts run, and the table of errors beside them keeps the specification's bounds."""

from __future__ import annotations

import csv
import importlib.util
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fewstep_kernels.attention import attention

FOLDER = Path(__file__).parents[3] / "kernels" / "benchmarks"
BOUND = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 6e-3}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[dict[str, str]]:
    with open(FOLDER / "attention_errors_interpreter.csv") as file:
        return list(csv.DictReader(file))


def test_the_written_errors_are_within_bounds_for_every_dtype_and_head_dim():
    plain = [row for row in rows() if row["abs o"]]
    assert len(plain) == 2 * 3 * 6
    for row in plain:
        assert max(float(row["rel o"]), float(row["rel to"])) < BOUND[row["dtype"]]
        assert float(row["rel gradients"]) < 2.5 * BOUND[row["dtype"]]


def test_the_written_errors_of_the_tangent_stay_where_its_centre_is_taken_out_and_grow_where_not():
    found = {(r["backend"], r["dtype"], r["dim"]): float(r["rel to"]) for r in rows() if not r["abs o"]}
    for backend in ("triton", "chunked"):
        assert found[backend, "bfloat16", "64, common 100"] < 1.2 * found[backend, "bfloat16", "64, common 0"]
    assert found["no centre", "bfloat16", "64, common 100"] > 40 * found["triton", "bfloat16", "64, common 100"]


@pytest.mark.parametrize("dim", [72, 128])
def test_the_written_errors_of_chunked_are_those_of_today(dim):
    module = script("attention_errors")
    written = {(r["backend"], r["dtype"], r["dim"]): r for r in rows()}["chunked", "float16", str(dim)]
    found = module.errors("chunked", dim, torch.float16, "cpu")
    assert found["rel to"] == pytest.approx(float(written["rel to"]), rel=0.1)
    assert module.centre(100.0, torch.bfloat16, "cpu")["no centre"] == pytest.approx(0.095, rel=0.2)


def test_back_ends_take_turns_and_those_that_cannot_serve_are_noted():
    module, turns = script("attention"), []
    some = [torch.randn(1, 1, 8, 16) for _ in range(6)]

    def noted(name, *x):
        turns.append(name)
        return attention(*x, backend=name)

    runs = {name: partial(module.tangent, partial(noted, name), some) for name in ("sdpa", "chunked", "sdpa_math")}
    table = {row["backend"]: row for row in module.compared(runs, "cpu", 3)}
    assert "no forward mode" in table["sdpa"]["note"]
    assert float(table["chunked"]["ms"]) > 0 and float(table["chunked"]["MiB"]) > 0
    assert turns[3:9] == ["chunked", "sdpa_math"] * 3
