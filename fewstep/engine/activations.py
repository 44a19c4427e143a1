"""Memory that a micro-batch's graph takes, found by running steps on tensors without storage: nothing is computed.

The method's own `train_step` runs, forward and backward, with every role on the meta device, and the bytes of storages
that come and go are counted. Attention counts as a fused kernel, which keeps no matrix of weights; with `precision:
bf16` layers that autocast runs in bfloat16 are counted in it. Workspaces of libraries and fragmentation come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..data.batch import Batch, Cond
from ..data.registry import make_source
from ..data.source import Source
from ..draws import Draw
from ..errors import UserError
from ..maths.scalars import value
from ..methods.base import Event, Method, Stage
from ..models.denoiser import Denoiser
from ..recipe import Recipe
from ..roles import Handle
from .barrier import Barrier, Gradients, advance

META = "meta"
MOST = 10  # steps until every role has stepped: some wait for several steps of another
# what autocast runs in bfloat16, and what in float32, of torch.nn.functional
HALF = ("linear", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention")
WHOLE = ("layer_norm", "group_norm", "softmax", "mse_loss")


class Allocations(TorchDispatchMode):
    """Bytes of storages that are made within the block and alive (`now`), and the most there were (`peak`).

    known: tensors that were there before, whose views are none.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The operation, its results counted."""
        return tree_map_only(Tensor, self._seen, func(*args, **(kwargs or {})))

    def _seen(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return tensor

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class Blank:
    """Stands for the rest of a pipeline: no condition is a condition of the same shape."""

    def __init__(self, around: Any):
        self.factor, self.longest = getattr(around, "factor", 8), getattr(around, "longest", 77)

    def null(self, cond: Cond) -> Cond:
        """`cond`."""
        return cond

    def decode(self, x0: Tensor) -> Tensor:
        """UserError: pictures take the pipeline's autoencoder."""
        raise UserError("a loss decodes pictures, and a plan loads no autoencoder")


def activations(
    method: Method,
    handles: Mapping[str, Handle],
    recipe: Recipe,
    stage: Stage,
    rows: int,
    accumulates: bool = False,
) -> dict[tuple[str, ...], int]:
    """Roles that step together -> bytes, above weights and gradients, at the peak of their part of a step of `rows` rows.

    handles: every role on the meta device; they are bound to the method and of no other use afterwards. accumulates:
    gradients of other micro-batches are held all the while; otherwise they come as activations go.
    Raises what a method raises that cannot run without its data.
    """
    for handle in handles.values():
        handle.around = None if handle.around is None else Blank(handle.around)  # type: ignore[assignment]
    latent = next((handle for handle in handles.values() if handle.around is not None), None)
    sources = {} if latent is not None else {name: make_source(said) for name, said in recipe.data.items()}
    method.bind(handles, sources, {})
    for name, handle in handles.items():
        handle.train_here(name in stage.trains)
    method.on(Event("stage_start", stage.name, 0))
    made = _rows(sources, stage, rows) if latent is None else Batch(torch.arange(rows), _latents(latent, recipe, rows))
    batch = made.to(META)
    peaks: dict[tuple[str, ...], int] = {}

    def parameters(roles: tuple[str, ...]) -> list[Any]:
        return [p for role in roles for p in handles[role].trainable().values()]

    def finish(barrier: Barrier) -> None:
        trained = parameters(barrier.roles)
        gradients = 0 if accumulates else sum(p.grad.nbytes for p in trained if p.grad is not None)
        peaks[barrier.roles] = max(peaks.get(barrier.roles, 0), seen.peak - gradients)
        for p in trained if not accumulates else ():
            p.grad = None
        seen.peak = seen.now

    for p in parameters(stage.trains) if accumulates else ():
        p.grad = torch.zeros_like(p)
    weights = method.config.weights
    asked = Gradients(parameters, lambda term: value(weights.get(term, 1.0), 0), 1)
    # one thread, since the counter belongs to the thread that it is opened in
    with ExitStack() as within:
        within.enter_context(torch.autograd.set_multithreading_enabled(False))
        within.enter_context(_as_on_a_gpu(recipe.train.precision))
        if recipe.train.offload_activations:
            within.enter_context(torch.autograd.graph.saved_tensors_hooks(_sent_away, _fetched))
        seen = within.enter_context(Allocations(_weights(handles)))
        for step in range(MOST):
            draw = Draw(recipe.train.seed, step, range(rows), device=META, scope=stage.name)
            advance([stage.step(batch, draw)], [(recipe.train.seed, stage.name, step)], asked, finish)
            if {role for roles in peaks for role in roles} >= set(stage.trains):
                break
    return peaks


def _weights(handles: Mapping[str, Handle]) -> Iterator[Tensor]:
    for handle in handles.values():
        for module in (handle.module, handle.adapter):
            if module is not None:
                yield from (*module.parameters(), *module.buffers())
        yield from (handle.ema or {}).values()


def _sent_away(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _fetched(said: tuple[torch.Size, torch.dtype]) -> Tensor:
    return torch.empty(said[0], dtype=said[1], device=META)


def _rows(sources: Mapping[str, Source], stage: Stage, rows: int) -> Batch:
    names = (stage.data,) if isinstance(stage.data, str) else tuple(stage.data)
    found = {}
    for name in names:
        ids = sources[name].heaviest(rows)
        found[name] = Batch(ids, sources[name].fetch(ids, Draw(0, 0, range(rows))))
    return found[names[0]] if len(names) == 1 else Batch(torch.arange(rows), found)


def _latents(handle: Handle, recipe: Recipe, rows: int) -> dict[str, Any]:
    """Rows of the right shapes made up, as neither data nor encoders need be there."""
    role = Denoiser.of(handle)
    around: Any = handle.around
    side = next((said["size"] // around.factor for said in recipe.data.values() if "size" in said), None)
    shape = role.row_shape if side is None else (*role.row_shape[:-2], side, side)
    role.family.fit(handle.module, shape)
    blank = role.family.blank(handle.module)
    cond = {name: _as_text(field, around.longest, rows) for name, field in blank.items()}
    return {"x0": torch.zeros(rows, *shape), "cond": Cond(**cond), "prompt": [""] * rows}


def _as_text(field: Tensor, longest: int, rows: int) -> Tensor:
    """A blank's field for `rows` texts of the longest sort; fields of one token are those of texts."""
    field = field.expand(rows, *field.shape[1:])
    is_text = field.ndim == 3 or (field.ndim == 2 and not field.is_floating_point() and field.shape[1] == 1)
    return field.expand(rows, longest, *field.shape[2:]).contiguous() if is_text else field


@contextmanager
def _as_on_a_gpu(precision: str) -> Iterator[None]:
    """Attention as a fused kernel, which the meta device lacks, and casts as autocast, which it lacks too, makes them.

    Functions are replaced rather than watched: layers that are run again in the backward pass meet no watcher there.
    """
    kept = {name: getattr(F, name) for name in (*HALF, *WHOLE)}
    replaced: dict[str, Callable[..., Any]] = {**kept, "scaled_dot_product_attention": _fused(kept[HALF[-1]])}
    if precision == "bf16":
        kinds = dict.fromkeys(HALF, torch.bfloat16) | dict.fromkeys(WHOLE, torch.float32)
        replaced = {name: _cast(function, kinds[name]) for name, function in replaced.items()}
    try:
        for name, function in replaced.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(F, name, function)


def _cast(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    def to(x: Any) -> Any:
        on_meta = isinstance(x, Tensor) and x.device.type == "meta" and x.is_floating_point()
        return x.to(dtype) if on_meta else x

    def cast(*args: Any, **kwargs: Any) -> Tensor:
        return function(*map(to, args), **{name: to(x) for name, x in kwargs.items()})

    return cast


def _fused(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        learned = attn_mask is not None and attn_mask.requires_grad
        if query.device.type != "meta" or learned or query.ndim != 4:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        mask = None if attn_mask is None else torch.empty_like(attn_mask, dtype=query.dtype)
        answer: Sequence[Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return answer[0]

    return fused
