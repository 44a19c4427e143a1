"""Proteina's network once more, as plain functions of a state dict with the released names: one-hot features, masks
multiplied in, attention by hand. Written to disagree with `ProteinaTransformer` wherever that reads the layout wrongly."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
HEADS, CLASSES = 2, (2, 3, 4)
WIDTH, LAYERS, PAIR, REGISTERS, INDEX, TIME, FOLD, COND = 16, 2, 8, 3, 12, 8, 6, 10


def random_weights(prefix: str = "", order: str = "self first", seed: int = 0) -> Weights:
    """A whole state dict of the smallest network; `order` is noted nowhere in it, as in the released ones."""
    shapes: dict[str, tuple[int, ...]] = {
        "registers": (REGISTERS, WIDTH),
        "linear_3d_embed.weight": (WIDTH, 3),
        "init_repr_factory.linear_out.weight": (WIDTH, INDEX + 4),
        "cond_factory.linear_out.weight": (COND, TIME + 3 * FOLD),
        "pair_repr_builder.init_repr_factory.linear_out.weight": (PAIR, 127 + 128 + 64),
        **_norm("pair_repr_builder.init_repr_factory.ln_out", PAIR),
        "pair_repr_builder.cond_factory.linear_out.weight": (COND, TIME),
        **_norm("pair_repr_builder.cond_factory.ln_out", COND),
        **_adaptive("pair_repr_builder.adaln", PAIR),
        **_norm("coors_3d_decoder.0", WIDTH),
        "coors_3d_decoder.1.weight": (3, WIDTH),
    }
    for level, classes in zip("CAT", CLASSES):
        shapes[f"cond_factory.feat_creators.1.embedding_{level}.weight"] = (classes + 1, FOLD)
    for i in (1, 2):
        shapes |= _transition(f"transition_c_{i}", COND, 2)
    for i in range(LAYERS):
        shapes |= _layer(f"transformer_layers.{i}")
    draw = torch.Generator().manual_seed(seed)
    return {prefix + name: 0.5 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _adaptive(name: str, width: int) -> dict[str, tuple[int, ...]]:
    gain = {f"{name}.to_gamma.0.weight": (width, COND), f"{name}.to_gamma.0.bias": (width,)}
    return {**_norm(f"{name}.norm_cond", COND), **gain, f"{name}.to_beta.weight": (width, COND)}


def _transition(name: str, width: int, factor: int) -> dict[str, tuple[int, ...]]:
    inner = factor * width
    return {f"{name}.swish_linear.0.weight": (2 * inner, width), f"{name}.linear_out.weight": (width, inner)}


def _layer(name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("mhba", "transition"):
        shapes |= _adaptive(f"{name}.{part}.adaln", WIDTH)
        scale = f"{name}.{part}.scale_output.to_adaln_zero_gamma.0"
        shapes |= {f"{scale}.weight": (WIDTH, COND), f"{scale}.bias": (WIDTH,)}
    shapes |= _transition(f"{name}.transition.transition", WIDTH, 4)
    mha = f"{name}.mhba.mha"
    for norm, width in (("node_norm", WIDTH), ("q_layer_norm", WIDTH), ("k_layer_norm", WIDTH), ("pair_norm", PAIR)):
        shapes |= _norm(f"{mha}.{norm}", width)
    for linear, out in (("to_qkv", 3 * WIDTH), ("to_g", WIDTH), ("to_out_node", WIDTH)):
        shapes |= {f"{mha}.{linear}.weight": (out, WIDTH), f"{mha}.{linear}.bias": (out,)}
    return shapes | {f"{mha}.to_bias.weight": (HEADS, PAIR)}


def velocity(w: Weights, x: Tensor, tau: Tensor, mask: Tensor, order: str = "self first", **known: Any) -> Tensor:
    """data - noise of the network `w`; known: x_self, broken, and labels counted from 0 with the last for "not known"."""
    rows, n = mask.shape
    m = mask.float()
    time = _time(tau)
    labels = known.get("labels", torch.tensor([CLASSES] * rows))
    folds = [w[f"cond_factory.feat_creators.1.embedding_{level}.weight"][labels[:, i]] for i, level in enumerate("CAT")]
    c = torch.cat([time, *folds], 1)[:, None].expand(-1, n, -1) * m[..., None] @ w["cond_factory.linear_out.weight"].T
    for i in (1, 2):
        c = _swish(w, f"transition_c_{i}", c) * m[..., None]
    index = torch.arange(1, n + 1)[:, None] * math.pi / 2056 ** (2 * torch.arange(INDEX // 2) / INDEX)
    index = torch.cat([index.sin(), index.cos()], 1).expand(rows, -1, -1)
    x_self, broken = known.get("x_self", torch.zeros_like(x)), known.get("broken", torch.zeros(rows, n)).float()
    others = [x_self, broken[..., None]] if order == "self first" else [broken[..., None], x_self]
    s = torch.cat([index, *others], 2) @ w["init_repr_factory.linear_out.weight"].T
    s = (s + x @ w["linear_3d_embed.weight"].T) * m[..., None]
    z = _pairs(w, x, known.get("x_self"), time)
    s = torch.cat([w["registers"].expand(rows, -1, -1), s], 1)
    z, c = F.pad(z, (0, 0, REGISTERS, 0, REGISTERS, 0)), F.pad(c, (0, 0, REGISTERS, 0))
    seen = F.pad(mask, (REGISTERS, 0), value=True)
    for i in range(LAYERS):
        s = _through(w, f"transformer_layers.{i}", s, z, c, seen)
    s = F.layer_norm(s[:, REGISTERS:], (WIDTH,), w["coors_3d_decoder.0.weight"], w["coors_3d_decoder.0.bias"])
    return s @ w["coors_3d_decoder.1.weight"].T * m[..., None]


def _time(tau: Tensor) -> Tensor:
    half = TIME // 2
    angle = 2000 * tau[:, None] * torch.exp(-math.log(2000) / (half - 1) * torch.arange(half))
    return torch.cat([angle.sin(), angle.cos()], 1)


def _pairs(w: Weights, x: Tensor, x_self: Tensor | None, time: Tensor) -> Tensor:
    index = torch.arange(x.shape[1])
    apart = torch.bucketize((index[:, None] - index[None]).float(), torch.linspace(-62.5, 62.5, 126))
    apart = F.one_hot(apart, 127).float().expand(len(x), -1, -1, -1)
    seen = torch.zeros(*apart.shape[:3], 128) if x_self is None else _distances(x_self, 128)
    z = torch.cat([apart, seen, _distances(x, 64)], 3)
    start = "pair_repr_builder."
    z = z @ w[start + "init_repr_factory.linear_out.weight"].T
    z = _layer_norm(w, start + "init_repr_factory.ln_out", z)
    c = _layer_norm(w, start + "cond_factory.ln_out", time @ w[start + "cond_factory.linear_out.weight"].T)
    return _modulate(w, start + "adaln", z, c[:, None, None])


def _distances(x: Tensor, bins: int) -> Tensor:
    apart = (x[:, :, None] - x[:, None]).norm(dim=3)
    return F.one_hot(torch.bucketize(apart, torch.linspace(0.1, 3.0, bins - 1)), bins).float()


def _layer_norm(w: Weights, name: str, h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], w[name + ".weight"], w[name + ".bias"])


def _modulate(w: Weights, name: str, h: Tensor, c: Tensor) -> Tensor:
    c = _layer_norm(w, name + ".norm_cond", c)
    gain = torch.sigmoid(c @ w[name + ".to_gamma.0.weight"].T + w[name + ".to_gamma.0.bias"])
    return F.layer_norm(h, h.shape[-1:]) * gain + c @ w[name + ".to_beta.weight"].T


def _swish(w: Weights, name: str, h: Tensor) -> Tensor:
    value, gate = (h @ w[name + ".swish_linear.0.weight"].T).chunk(2, -1)
    return F.silu(gate) * value @ w[name + ".linear_out.weight"].T


def _scaled(w: Weights, name: str, h: Tensor, c: Tensor) -> Tensor:
    start = name + ".scale_output.to_adaln_zero_gamma.0"
    return h * torch.sigmoid(c @ w[start + ".weight"].T + w[start + ".bias"])


def _through(w: Weights, name: str, s: Tensor, z: Tensor, c: Tensor, seen: Tensor) -> Tensor:
    keep = seen.float()[..., None]
    mixed = _attend(w, f"{name}.mhba.mha", _modulate(w, f"{name}.mhba.adaln", s, c) * keep, z, seen)
    s = (s + _scaled(w, f"{name}.mhba", mixed, c)) * keep
    moved = _swish(w, f"{name}.transition.transition", _modulate(w, f"{name}.transition.adaln", s, c) * keep)
    return (s + _scaled(w, f"{name}.transition", moved, c)) * keep


def _attend(w: Weights, name: str, s: Tensor, z: Tensor, seen: Tensor) -> Tensor:
    def linear(part: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.{part}.weight"].T + w[f"{name}.{part}.bias"]

    s = _layer_norm(w, f"{name}.node_norm", s)
    q, k, v = linear("to_qkv", s).chunk(3, 2)
    q, k = _layer_norm(w, f"{name}.q_layer_norm", q), _layer_norm(w, f"{name}.k_layer_norm", k)
    bias = _layer_norm(w, f"{name}.pair_norm", z) @ w[f"{name}.to_bias.weight"].T
    heads = []
    for i, (a, b, value) in enumerate(zip(q.chunk(HEADS, 2), k.chunk(HEADS, 2), v.chunk(HEADS, 2))):
        logits = a @ b.mT / math.sqrt(a.shape[-1]) + bias[..., i]
        heads.append(logits.masked_fill(~(seen[:, :, None] & seen[:, None]), -1e30).softmax(2) @ value)
    return linear("to_out_node", torch.sigmoid(linear("to_g", s)) * torch.cat(heads, 2))
