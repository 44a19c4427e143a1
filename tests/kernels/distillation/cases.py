"""Small heads and teachers, and a loss with its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from fewstep_kernels.distillation import Head, TopK, distillation_loss
from torch import Tensor

KINDS = ["forward_kl", "reverse_kl", "jsd"]
TOKENS, WORDS = 7, 11


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals that depend on the seed alone, whatever the dtype they are rounded to."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def student(tokens: int = TOKENS, words: int = WORDS, width: int = 4, dtype: torch.dtype = torch.float64) -> Head:
    """A head whose hidden states, weights and bias take gradients."""
    parts = (
        numbers(0, tokens, width, dtype=dtype),
        numbers(1, words, width, dtype=dtype),
        numbers(2, words, dtype=dtype),
    )
    return Head(*(part.requires_grad_() for part in parts))


def teacher(tokens: int = TOKENS, words: int = WORDS, width: int = 6, dtype: torch.dtype = torch.float64) -> Head:
    """A head of another width."""
    return Head(numbers(3, tokens, width, dtype=dtype), numbers(4, words, width, dtype=dtype) / 2)


def top_k(k: int, rest: str, temperature: float = 1.0, **sizes: Any) -> TopK:
    """What a store would keep of `teacher`."""
    log_probs, ids = (teacher(**sizes).logits().double() / temperature).log_softmax(-1).topk(k)
    return TopK(ids, log_probs, rest)  # type: ignore[arg-type]


def teachers(temperature: float = 1.0, **sizes: Any) -> Mapping[str, Any]:
    """Every form a teacher may have."""
    stored = {rest: top_k(3, rest, temperature, **sizes) for rest in ("tail", "zero", "drop")}
    return {"head": teacher(**sizes), "logits": teacher(**sizes).logits(), **stored}


FORMS = list(teachers())
# With a top k, reverse KL is finite only where the other words are dropped.
PAIRS = [
    pair for pair in itertools.product(KINDS, FORMS) if pair not in (("reverse_kl", "tail"), ("reverse_kl", "zero"))
]


def value_and_gradients(head: Head, given: Any, **said: Any) -> tuple[Tensor, ...]:
    """The loss, and its gradients in hidden states, weights and bias."""
    parts = [x for x in (head.hidden, head.weight, head.bias) if x is not None]
    loss = distillation_loss(head, given, **said)
    return loss.detach(), *torch.autograd.grad(loss, parts)


def worst(found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """Largest relative Frobenius error over the tensors."""
    assert len(found) == len(right)
    pairs = [(a.double(), b.double()) for a, b in zip(found, right, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)
