"""Inputs that do not fit each other: ValueErrors that name the mend."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import RESTS, Divergence, Head, Teacher, TopK


def tensor_of(teacher: Teacher) -> Tensor:
    """What holds the teacher's tokens: hidden states, log-probabilities or logits."""
    if isinstance(teacher, Head):
        return teacher.hidden
    return teacher.log_probs if isinstance(teacher, TopK) else teacher


def check(student: Head, teacher: Teacher, mask: Tensor | None, chunk: int | None, divergence: Divergence) -> None:
    """Shapes, dtypes, devices and options. ValueError where they do not fit."""
    tokens, device = student.hidden.shape[:-1], student.hidden.device
    _check_head("student", student)
    if isinstance(teacher, Head):
        _check_head("teacher", teacher)
    if isinstance(teacher, TopK):
        _check_top_k(teacher, divergence)
    theirs = tensor_of(teacher)
    if not theirs.is_floating_point():
        raise ValueError(f"teacher is {_name(theirs.dtype)}: give a floating dtype")
    if theirs.shape[:-1] != tokens:
        raise ValueError(
            f"student has tokens {list(tokens)} and teacher {list(theirs.shape[:-1])}: give the same tokens"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens):
        raise ValueError(f"mask is {_name(mask.dtype)} {list(mask.shape)}: give bool {list(tokens)}")
    for name, x in (("teacher", theirs), ("mask", mask)):
        if x is not None and x.device != device:
            raise ValueError(f"student is on {device} and {name} on {x.device}: move one")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: give at least 1")


def _check_head(name: str, head: Head) -> None:
    hidden, weight, bias = head.hidden, head.weight, head.bias
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: hidden {list(hidden.shape)} does not fit weight {list(weight.shape)}: give [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias {list(bias.shape)} does not fit weight {list(weight.shape)}: give [V]")
    dtypes = [x.dtype for x in (hidden, weight, bias) if x is not None]
    if len(set(dtypes)) > 1 or not hidden.is_floating_point():
        raise ValueError(
            f"{name}: hidden, weight and bias are {', '.join(map(_name, dtypes))}: "
            "give one floating dtype, or call under torch.autocast"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{name}: hidden is on {hidden.device} and weight on {weight.device}: move one")


def _check_top_k(top: TopK, divergence: Divergence) -> None:
    if top.rest not in RESTS:
        raise ValueError(f"no rest '{top.rest}': {', '.join(RESTS)}")
    if top.ids.dtype != torch.int64 or top.ids.shape != top.log_probs.shape:
        raise ValueError(
            f"ids are {_name(top.ids.dtype)} {list(top.ids.shape)} and log_probs {list(top.log_probs.shape)}: "
            "give int64 of the same shape"
        )
    if divergence.kind == "reverse_kl" and top.rest != "drop":
        raise ValueError("reverse_kl needs the teacher's probability of every word: use forward_kl, jsd or rest='drop'")


def check_words(student: Head, teacher: Teacher) -> None:
    """Vocabularies of different sizes: ValueError that names the size they could share."""
    words = len(student.weight)
    if not isinstance(teacher, TopK):
        theirs = len(teacher.weight) if isinstance(teacher, Head) else teacher.shape[-1]
        if theirs != words:
            shared = min(words, theirs)
            raise ValueError(
                f"student has {words} words and teacher {theirs}: "
                f"if the first {shared} are the same, give vocabulary={shared}"
            )


def check_ids(teacher: Teacher, words: int) -> None:
    """Stored ids outside of the vocabulary: ValueError. On a GPU, which would have to be waited for, the gather stops instead."""
    if not isinstance(teacher, TopK) or teacher.ids.device.type != "cpu" or not teacher.ids.numel():
        return
    low, high = teacher.ids.min().item(), teacher.ids.max().item()
    if low < 0 or high >= words:
        raise ValueError(
            f"ids run from {low} to {high} and the student has {words} words: mask those tokens, or store anew"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
