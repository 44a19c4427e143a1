"""An equivariant flow network over protein backbones for small sizes: CA coordinates in nanometres, attention biased by pairs.

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

Features and conditions are those of Proteina (Geffner et al., arXiv 2503.00710): with tau = 1 for data,
x = (1 - tau) noise + tau data, and the network answers u = data - noise. Unlike Proteina's it turns with the chain, which
small networks do not learn from data.
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

SEPARATIONS = 127  # bins of j - i: -63 .. 63, the ends open
DISTANCES, SELF_DISTANCES = 64, 128  # bins of |x_i - x_j| over NEAR .. FAR nanometres, the ends open
NEAR, FAR = 0.1, 3.0
TIME_SCALE = 2000.0
LEVELS = 3  # of a CATH label: class, architecture, topology


class ProteinFlowTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """u(x, tau) for chains of any length, padded to one and masked.

    Args:
        width, num_layers, num_heads: of the residues' representation and its attention.
        pair_width: of the pairs' representation, which biases the attention of every layer.
        registers: extra tokens that belong to no residue.
        index_width, time_width, cond_width: of the residue-index embedding, the time embedding, and the condition
            that modulates every layer.
        cath_classes: numbers of labels at the levels C, A, T; label 0 means "not known". Empty: no fold classes.
        self_conditioning: whether a previous prediction of the clean chain is an input.
        window: a residue sees distances and handedness among so many neighbours on either side; pairs see how they are
            turned to each other, and the answer is a weighted sum of directions (`Directions`).
    """

    _supports_gradient_checkpointing = True
    _gradient_checkpointing_func: Any = None

    @register_to_config
    def __init__(
        self,
        width: int = 96,
        num_layers: int = 4,
        num_heads: int = 4,
        pair_width: int = 32,
        registers: int = 2,
        index_width: int = 64,
        time_width: int = 64,
        cond_width: int = 128,
        cath_classes: tuple = (),
        self_conditioning: bool = True,
        window: int = 3,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.sequence = nn.Linear(index_width + 1, width)
        self.neighbourhood = Neighbourhood(window, width)
        self.pairs = PairFeatures(pair_width, self_conditioning)
        self.folds = nn.ModuleList(nn.Embedding(classes + 1, time_width) for classes in cath_classes)
        self.condition: Any = nn.Sequential(
            nn.Linear(time_width * (1 + len(self.folds)), cond_width), nn.SiLU(), nn.Linear(cond_width, cond_width)
        )
        self.register_tokens = nn.Parameter(0.02 * torch.randn(registers, width))
        self.layers = nn.ModuleList(Layer(width, num_heads, pair_width, cond_width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.output = Directions(width, pair_width, window)

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
        mask = mask.bool()
        cond = self._condition(tau, cath).to(x.dtype)
        pair = self.pairs(x, x_self)
        h = self._residues(x, broken) + self.neighbourhood(x, tau, mask)
        extra = self.register_tokens.to(h.dtype).expand(len(x), -1, -1)
        count = extra.shape[1]
        h = torch.cat([extra, h], 1)
        seen = F.pad(mask, (count, 0), value=True)
        # registers stand in no relation to residues: their bias is 0
        layer: Any
        for layer in self.layers:
            bias = F.pad(layer.bias(pair), (count, 0, count, 0)).masked_fill(~seen[:, None, None], -torch.inf)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(layer, h, bias, cond)
            else:
                h = layer(h, bias, cond)
        h = self.norm(h[:, count:])
        return self.output(h, pair, x, mask) * mask[..., None]

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the config and, beside it, this file, so that a saved folder stays loadable."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _condition(self, tau, cath):
        features = [waves(TIME_SCALE * tau, self.config["time_width"], TIME_SCALE)]
        for level, embedding in enumerate(self.folds):
            known = tau.new_zeros(len(tau), dtype=torch.long) if cath is None else cath[:, level]
            features.append(embedding(known))
        return self.condition(torch.cat(features, 1).to(self.condition[0].weight.dtype))

    def _residues(self, x, broken):
        index = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)
        places = waves(index, self.config["index_width"], TIME_SCALE).to(x.dtype).expand(len(x), -1, -1)
        breaks = x.new_zeros(x.shape[:2]) if broken is None else broken.to(x.dtype)
        return self.sequence(torch.cat([places, breaks[..., None]], 2))


class PairFeatures(nn.Module):
    """LayerNorm of embedded sequence separation, distance in x and in the chain predicted before, and of `turns`."""

    def __init__(self, width, self_conditioning):
        super().__init__()
        self.turned = nn.Linear(4, width, bias=False)
        self.separation = nn.Embedding(SEPARATIONS, width)
        self.distance = nn.Embedding(DISTANCES, width)
        self.self_distance = nn.Embedding(SELF_DISTANCES, width) if self_conditioning else None
        self.norm = nn.LayerNorm(width)

    def forward(self, x, x_self):
        """[rows, residues, residues, width]"""
        index = torch.arange(x.shape[1], device=x.device)
        apart = (index[None] - index[:, None]).clamp(-(SEPARATIONS // 2), SEPARATIONS // 2) + SEPARATIONS // 2
        pair = self.separation(apart)[None] + self.distance(binned(x, DISTANCES)) + self.turned(turns(x))
        if x_self is not None and self.self_distance is not None:
            pair = pair + self.self_distance(binned(x_self, SELF_DISTANCES))
        return self.norm(pair)


class Layer(nn.Module):
    """Pair-biased attention, then a gated transition, both modulated by the condition."""

    def __init__(self, width, heads, pair_width, cond_width):
        super().__init__()
        self.heads = heads
        self.pair_bias = nn.Linear(pair_width, heads, bias=False)
        self.norm_attention = Modulated(width, cond_width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q, self.norm_k = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.gate = nn.Linear(width, width)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_transition = Modulated(width, cond_width)
        self.up = nn.Linear(width, 8 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def bias(self, pair):
        """Attention bias [rows, heads, residues, residues]."""
        return self.pair_bias(pair).permute(0, 3, 1, 2)

    def forward(self, h, bias, cond):
        """h [rows, tokens, width] -> the same."""
        y, scale = self.norm_attention(h, cond)
        rows, tokens, width = y.shape
        q, k, v = self.qkv(y).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v, attn_mask=bias.to(v.dtype))
        mixed = mixed.transpose(1, 2).reshape(rows, tokens, width)
        h = h + scale * self.out(self.gate(y).sigmoid() * mixed)
        y, scale = self.norm_transition(h, cond)
        value, gate = self.up(y).chunk(2, 2)
        return h + scale * self.down(F.silu(gate) * value)


class Modulated(nn.Module):
    """LayerNorm with scale and shift from the condition, and a third output that scales what is added back.

    The last starts small, so that a deep stack starts near the identity.
    """

    def __init__(self, width, cond_width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.condition = blank(nn.Linear(cond_width, 3 * width))
        with torch.no_grad():
            self.condition.bias[2 * width :] = 0.1

    def forward(self, h, cond):
        """(normalised h, scale), both [rows, tokens, width] up to broadcasting."""
        gain, shift, scale = self.condition(F.silu(cond))[:, None].chunk(3, 2)
        return self.norm(h) * (1 + gain) + shift, scale


class Neighbourhood(nn.Module):
    """What a residue sees of its neighbours in the chain, whichever way the chain is turned.

    Distances among the 2 window + 1 residues around it, and the handedness of every four consecutive ones. Distances count
    from learned ones, once in units of the noise, sqrt(t^2 + .02^2) nm, and once in nanometres: the first tells bonds to
    small networks at low noise.
    """

    def __init__(self, window, width):
        super().__init__()
        self.window = window
        i, j = torch.triu_indices(2 * window + 1, 2 * window + 1, 1)
        self.register_buffer("first", i, persistent=False)
        self.register_buffer("second", j, persistent=False)
        self.usual = nn.Parameter(0.38 * (j - i).float() ** 0.75)
        self.embed = nn.Sequential(
            nn.Linear(3 * len(i) + 2 * window - 2, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x, tau, mask):
        """[rows, residues, width]"""
        around, there = windows(x, mask, self.window)
        both = there[..., self.first] * there[..., self.second]
        apart = (around[..., self.first, :] - around[..., self.second, :]).square().sum(-1).add(1e-8).sqrt()
        noise = ((1 - tau).square() + 4e-4).sqrt()[:, None, None]
        off = apart - self.usual
        steps = F.normalize(around.diff(dim=2), dim=-1, eps=1e-4)
        hands = (torch.linalg.cross(steps[..., :-2, :], steps[..., 1:-1, :]) * steps[..., 2:, :]).sum(-1)
        hands = hands * there[..., :-3] * there[..., 3:]
        seen = [off.div(noise).div(3).tanh() * both, off.div(0.5).tanh() * both, both.expand_as(off)]
        return self.embed(torch.cat([*seen, hands], 2).to(x.dtype))


class Directions(nn.Module):
    """u as a sum of directions that turn with the chain, weighted by what the residues and pairs know.

    u_i = sum_d a_id e_{i, i+d} + sum_j w_ij e_ij - g_i x_i, with e_ij = (x_j - x_i) / |x_j - x_i| and d over the
    neighbours in the chain. Starts at 0.
    """

    def __init__(self, width, pair_width, window):
        super().__init__()
        self.window = window
        self.near = blank(nn.Linear(width, 2 * window))
        self.centre = blank(nn.Linear(width, 1))
        self.here, self.there = nn.Linear(width, pair_width), nn.Linear(width, pair_width)
        self.pair = nn.Linear(pair_width, pair_width)
        self.far = blank(nn.Linear(pair_width, 1))

    def forward(self, h, pair, x, mask):
        """[rows, residues, 3]"""
        around, there = windows(x, mask, self.window)
        kept = [d for d in range(2 * self.window + 1) if d != self.window]
        steps = F.normalize(around[..., kept, :] - x[:, :, None], dim=-1, eps=1e-2) * there[..., kept, None]
        near = (self.near(h)[..., None] * steps).sum(2)
        hidden = F.silu(self.pair(pair) + self.here(h)[:, :, None] + self.there(h)[:, None])
        weight = self.far(hidden)[..., 0] * mask[:, None]
        ways = F.normalize(x[:, None] - x[:, :, None], dim=-1, eps=1e-2)
        return near + torch.einsum("bij,bijc->bic", weight, ways) - self.centre(h) * x


def blank(layer):
    """The linear layer, answering 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def windows(x, mask, reach):
    """Coordinates [rows, residues, 2 reach + 1, 3] of a residue's neighbours, and 1 where there is one, 0 elsewhere."""
    size = 2 * reach + 1
    around = F.pad(x, (0, 0, reach, reach)).unfold(1, size, 1).transpose(2, 3)
    there = F.pad(mask, (reach, reach)).unfold(1, size, 1)
    return around, (there & mask[..., None]).to(x.dtype)


def turns(x):
    """How two residues lie to each other, [rows, residues, residues, 4]: dot products of the directions of the chain at
    both and of the way between them, and the handedness of the three."""
    before, after = F.pad(x, (0, 0, 1, 0))[:, :-1], F.pad(x, (0, 0, 0, 1))[:, 1:]
    along = F.normalize(after - before, dim=-1, eps=1e-2)
    way = F.normalize(x[:, None] - x[:, :, None], dim=-1, eps=1e-2)
    here, there = along[:, :, None], along[:, None]
    hand = (torch.linalg.cross(here.expand_as(way), there.expand_as(way)) * way).sum(-1)
    return torch.stack([(here * there).sum(-1), (here * way).sum(-1), (there * way).sum(-1), hand], -1)


def waves(value, width, longest):
    """[sin(v f), cos(v f)] with width / 2 frequencies from 1 down to 1 / longest, float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=value.device) * (-math.log(longest) / (half - 1)))
    angle = value.float()[..., None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], -1)


def binned(x, bins):
    """Numbers of the bins of all pair distances, [rows, residues, residues]."""
    edges = torch.linspace(NEAR, FAR, bins - 1, device=x.device)
    return torch.bucketize(torch.cdist(x.float(), x.float()).detach(), edges)
