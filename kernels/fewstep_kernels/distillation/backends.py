"""The back ends of the distillation loss by name, and the choice among them."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .checks import tensor_of
from .chunked import TORCH, RowOps, fused
from .inputs import KINDS, Divergence, Head, Teacher, TopK
from .reference import reference

log = logging.getLogger(__name__)

LARGE = 2**22  # logits; below it memory is no question, and the reference has gradients of any order
TRITON_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative; what rounding explains


def chosen(name: str, student: Head, teacher: Teacher) -> Callable[..., Tensor]:
    """The back end `name`. Raises ValueError with the reason and the names that would serve."""
    if name == "auto":
        name = automatic(student, teacher)
    if name not in BACKENDS:
        raise ValueError(f"no back end '{name}' of the distillation loss: auto, {', '.join(BACKENDS)}")
    reason = refusal(student, teacher) if name == "triton" else None
    if reason:
        raise ValueError(f"backend='triton' {reason}: write chunked, reference or auto")
    return BACKENDS[name]


def automatic(student: Head, teacher: Teacher) -> str:
    """The kernels on CUDA where they have proved themselves; else `chunked` if there are many logits."""
    hidden, words = student.hidden, len(student.weight)
    if hidden.is_cuda and not refusal(student, teacher) and proven(hidden.device, hidden.dtype):
        return "triton"
    return "chunked" if len(hidden) * words > LARGE else "reference"


def refusal(student: Head, teacher: Teacher) -> str | None:
    """Why the kernels cannot take these tensors, or None."""
    theirs = () if isinstance(teacher, TopK) else (tensor_of(teacher).dtype,)
    for dtype in (student.hidden.dtype, *theirs):
        if dtype not in TRITON_ERROR:
            return f"does not take {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if not student.hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"does not run on {student.hidden.device.type}"
    return None


@cache
def proven(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile on `device` and agree with torch on a small case; found once, and said in the log."""
    from .rows import TRITON

    try:
        error = disagreement(TRITON, device, dtype)
    except Exception as reason:  # a compiler may fail in any way, and `chunked` serves then
        log.warning("distillation loss on %s, %s: chunked (triton failed: %s)", device, dtype, reason)
        return False
    good = error < TRITON_ERROR[dtype]
    log.log(
        logging.INFO if good else logging.WARNING,
        "distillation loss on %s, %s: %s (triton differs from torch by %.1e)",
        *(device, dtype, "triton" if good else "chunked", error),
    )
    return good


def disagreement(ops: RowOps, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of `ops` against torch's, on three rows of logits that end within a second tile."""
    generator = torch.Generator().manual_seed(0)
    z, y = (4 * torch.randn(3, 4100, generator=generator).to(device, dtype) for _ in range(2))
    mass = torch.tensor([1.0, -0.5, 0.1], device=device)
    worst = 0.0
    for kind in KINDS:
        measure = Divergence(kind, 0.3, 2.0, 1.0)  # type: ignore[arg-type]
        found, right = (f.compare(z.clone(), y.clone(), measure) for f in (ops, TORCH))
        worst = max(worst, *map(_error, found, right))
    lse = TORCH.lse(z.clone(), 2.0)
    spread = (f.spread(z.clone(), 2.0, lse, mass) for f in (ops, TORCH))
    return max(worst, _error(ops.lse(z.clone(), 2.0), lse), _error(*spread))


def _error(found: Tensor, right: Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def _reference(
    student: Head, teacher: Teacher, divergence: Divergence, keep: Tensor, total: Tensor, _: int | None
) -> Tensor:
    return reference(student, teacher, divergence, keep, total)


def _triton(*parts: Any) -> Tensor:
    from .rows import TRITON

    return partial(fused, ops=TRITON)(*parts)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "triton": _triton,
    "chunked": partial(fused, ops=TORCH),
    "reference": _reference,
}
