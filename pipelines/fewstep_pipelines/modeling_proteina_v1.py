"""Proteina's network without triangle layers, over CA coordinates in nanometres (Geffner et al., arXiv 2503.00710).

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

With tau = 1 for data, x = (1 - tau) noise + tau data, and the network answers u = data - noise. It is not equivariant;
rotations are learned. Written from the layout of the released weights, which load into it exactly.
"""

import math
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

SEPARATIONS = 127  # bins of i - j: -63 .. 63, the ends open
DISTANCES, SELF_DISTANCES = 64, 128  # bins of |x_i - x_j| over NEAR .. FAR nanometres, the ends open
NEAR, FAR = 0.1, 3.0
TIME_SCALE, LONGEST_INDEX = 2000.0, 2056.0
SCALE_BIAS = -2.0  # of what is added back by a new layer: sigmoid(-2) = .12


class ProteinaTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """u(x, tau) for chains of any length, padded to one and masked.

    Args:
        width, num_layers, num_heads: of the residues' representation and its attention.
        pair_width: of the pairs' representation, which biases the attention of every layer.
        registers: extra tokens that belong to no residue; they are told no condition and stand in no relation to residues.
        index_width, time_width, fold_width, cond_width: of the embeddings of residue index, time and each level of a
            fold label, and of the condition made of the last two.
        cath_classes: numbers of labels at the levels C, A, T; label 0 means "not known". Empty: no fold classes.
        self_conditioning: whether a previous prediction of the clean chain is an input.
    """

    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Any = None

    @register_to_config
    def __init__(
        self,
        width: int = 768,
        num_layers: int = 15,
        num_heads: int = 12,
        pair_width: int = 512,
        registers: int = 10,
        index_width: int = 128,
        time_width: int = 256,
        fold_width: int = 256,
        cond_width: int = 512,
        cath_classes: tuple = (),
        self_conditioning: bool = True,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.coordinates = nn.Linear(3, width, bias=False)
        self.sequence = nn.Linear(index_width + 1 + 3 * self_conditioning, width, bias=False)
        self.folds = nn.ModuleList(nn.Embedding(classes + 1, fold_width) for classes in cath_classes)
        self.condition: Any = nn.Sequential(
            nn.Linear(time_width + fold_width * len(self.folds), cond_width, bias=False),
            Transition(cond_width, 2),
            Transition(cond_width, 2),
        )
        self.pairs = Pairs(pair_width, time_width, cond_width, self_conditioning)
        self.register_tokens = nn.Parameter(0.05 * torch.randn(registers, width))
        self.layers = nn.ModuleList(Layer(width, num_heads, pair_width, cond_width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 3, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(
        self,
        x: torch.Tensor,
        tau: torch.Tensor,
        mask: torch.Tensor,
        cath: Optional[torch.Tensor] = None,  # noqa: UP045
        x_self: Optional[torch.Tensor] = None,  # noqa: UP045
        broken: Optional[torch.Tensor] = None,  # noqa: UP045
    ) -> torch.Tensor:
        """u [rows, residues, 3], zero in padding.

        Args:
            x: noisy CA coordinates [rows, residues, 3], nanometres, centred.
            tau: [rows], 1 = data.
            mask: [rows, residues], true for residues.
            cath: fold labels [rows, 3], 0 = not known; None: none known.
            x_self: a clean chain predicted before, [rows, residues, 3]; None: zeros.
            broken: [rows, residues], true after which residues the chain is broken; None: nowhere.
        """
        mask, x_self = mask.bool(), x_self if self.config["self_conditioning"] else None
        time = waves(TIME_SCALE * tau, self.config["time_width"]).to(x.dtype)
        cond = self._condition(time, cath)
        pair = self.pairs(x, x_self, time)
        extra = self.register_tokens.to(x.dtype).expand(len(x), -1, -1)
        count = extra.shape[1]
        h = torch.cat([extra, self._residues(x, x_self, broken)], 1)
        seen = F.pad(mask, (count, 0), value=True)
        told = torch.stack([torch.zeros_like(cond), cond], 1)  # what registers are told, and what residues are
        kinds = (torch.arange(h.shape[1], device=x.device) >= count).long()
        layer: Any
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(layer, h, pair, seen, told, kinds)
            else:
                h = layer(h, pair, seen, told, kinds)
        return self.output(self.norm(h[:, count:])) * mask[..., None]

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the config and, beside it, this file, so that a saved folder stays loadable."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _condition(self, time, cath):
        known = [time.new_zeros(len(time), dtype=torch.long)] * len(self.folds) if cath is None else cath.unbind(1)
        return self.condition(torch.cat([time, *(embed(c) for embed, c in zip(self.folds, known))], 1))

    def _residues(self, x, x_self, broken):
        index = index_waves(x.shape[1], self.config["index_width"], x.device).to(x.dtype).expand(len(x), -1, -1)
        breaks = x.new_zeros(x.shape[:2]) if broken is None else broken.to(x.dtype)
        features = [index, breaks[..., None]]
        if self.config["self_conditioning"]:
            features.insert(1, torch.zeros_like(x) if x_self is None else x_self)
        return self.coordinates(x) + self.sequence(torch.cat(features, 2))


class Pairs(nn.Module):
    """What is known of two residues: how far they are apart in the sequence, in x, and in the chain predicted before.

    One linear layer over bins, so its columns are looked up. Normalised, then modulated by the time alone.
    """

    def __init__(self, width, time_width, cond_width, self_conditioning):
        super().__init__()
        bins = SEPARATIONS + SELF_DISTANCES * self_conditioning + DISTANCES
        self.features = nn.Linear(bins, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.time = nn.Sequential(nn.Linear(time_width, cond_width, bias=False), nn.LayerNorm(cond_width))
        self.modulated = AdaptiveNorm(width, cond_width)

    def forward(self, x, x_self, time):
        """[rows, residues, residues, width]"""
        rows = self.features.weight.T
        index = torch.arange(x.shape[1], device=x.device)
        apart = (index[:, None] - index[None]).clamp(-(SEPARATIONS // 2), SEPARATIONS // 2) + SEPARATIONS // 2
        pair = F.embedding(apart, rows[:SEPARATIONS])[None] + F.embedding(binned(x, DISTANCES), rows[-DISTANCES:])
        if x_self is not None:
            pair = pair + F.embedding(binned(x_self, SELF_DISTANCES), rows[SEPARATIONS:-DISTANCES])
        return self.modulated(self.norm(pair), self.time(time)[:, None, None])


class Layer(nn.Module):
    """Pair-biased attention, then a gated transition; the condition modulates what both read and what they add."""

    def __init__(self, width, heads, pair_width, cond_width):
        super().__init__()
        self.norm_attention = AdaptiveNorm(width, cond_width)
        self.attention = PairBiasedAttention(width, heads, pair_width)
        self.scale_attention = nn.Linear(cond_width, width)
        self.norm_transition = AdaptiveNorm(width, cond_width)
        self.transition = Transition(width, 4)
        self.scale_transition = nn.Linear(cond_width, width)
        for scale in (self.scale_attention, self.scale_transition):
            nn.init.zeros_(scale.weight)
            nn.init.constant_(scale.bias, SCALE_BIAS)

    def forward(self, h, pair, seen, told, kinds):
        """h [rows, tokens, width] -> the same. told [rows, 2, cond_width], of which token i is told told[:, kinds[i]]."""
        y = self.attention(self.norm_attention(h, told, kinds), pair, seen)
        h = h + self.scale_attention(told).sigmoid()[:, kinds] * y
        y = self.transition(self.norm_transition(h, told, kinds))
        return h + self.scale_transition(told).sigmoid()[:, kinds] * y


class PairBiasedAttention(nn.Module):
    """Gated attention with normalised queries and keys, biased by the pairs; a register's pair is 0."""

    def __init__(self, width, heads, pair_width):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_pair = nn.LayerNorm(width), nn.LayerNorm(pair_width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pair_bias = nn.Linear(pair_width, heads, bias=False)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, h, pair, seen):
        """h [rows, tokens, width] -> the same; seen [rows, tokens], true for tokens that may be read."""
        h = self.norm(h)
        q, k, v = self.qkv(h).chunk(3, 2)
        q, k, v = (self._heads(part) for part in (self.norm_q(q), self.norm_k(k), v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(pair, seen).to(v.dtype))
        return self.out(self.gate(h).sigmoid() * mixed.transpose(1, 2).flatten(2))

    def _heads(self, part):
        return part.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _bias(self, pair, seen):
        """[rows, heads, tokens, tokens], the registers' first."""
        extra = seen.shape[1] - pair.shape[1]
        alone = self.pair_bias(self.norm_pair.bias)[:, None, None]  # of a pair that is 0
        bias = self.pair_bias(self.norm_pair(pair)).permute(0, 3, 1, 2) - alone
        return (F.pad(bias, (extra, 0, extra, 0)) + alone).masked_fill(~seen[:, None, None], -torch.inf)


class AdaptiveNorm(nn.Module):
    """LayerNorm whose gain, between 0 and 1, and shift are read from the normalised condition."""

    def __init__(self, width, cond_width):
        super().__init__()
        self.norm, self.norm_cond = nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(cond_width)
        self.gain, self.shift = nn.Linear(cond_width, width), nn.Linear(cond_width, width, bias=False)

    def forward(self, h, cond, kinds=None):
        """h of any shape with width last; cond broadcasts, or is [rows, kinds, cond_width] and picked for each token."""
        cond = self.norm_cond(cond)
        gain, shift = self.gain(cond).sigmoid(), self.shift(cond)
        if kinds is not None:
            gain, shift = gain[:, kinds], shift[:, kinds]
        return self.norm(h) * gain + shift


class Transition(nn.Module):
    """down(silu(gate) * value), `factor` times wider inside."""

    def __init__(self, width, factor):
        super().__init__()
        self.up = nn.Linear(width, 2 * factor * width, bias=False)
        self.down = nn.Linear(factor * width, width, bias=False)

    def forward(self, h):
        """[..., width] -> the same."""
        value, gate = self.up(h).chunk(2, -1)
        return self.down(F.silu(gate) * value)


def waves(value, width):
    """[sin(v f), cos(v f)] with width / 2 frequencies from 1 down to 1 / TIME_SCALE, float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=value.device) * (-math.log(TIME_SCALE) / (half - 1)))
    angle = value.float()[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], 1)


def index_waves(residues, width, device):
    """[sin(i f), cos(i f)] of the indices 1 .. residues, with frequencies pi 2056^(-2 k / width), float32."""
    power = -2 * torch.arange(width // 2, device=device) / width
    angle = torch.arange(1, residues + 1, device=device)[:, None] * math.pi * LONGEST_INDEX**power
    return torch.cat([angle.sin(), angle.cos()], 1)


def binned(x, bins):
    """Numbers of the bins of all pair distances, [rows, residues, residues]."""
    edges = torch.linspace(NEAR, FAR, bins - 1, device=x.device)
    return torch.bucketize(torch.cdist(x.float(), x.float()).detach(), edges)
