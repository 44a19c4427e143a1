"""Reward guided latent consistency distillation (Li et al., arXiv 2403.11027): LCM plus a reward on single steps.

    L = huber( f(x_n, t_n, c, g), sg f_ema(x_m, t_m, c, g) ) - beta R( decode(f(x_n, t_n, c, g)), c )

f is the student's boundary-scaled clean prediction, x_m the guided teacher's DDIM step from x_n. mode "direct": the
gradient of R flows through the frozen reward model and decoder. mode "proxy": R is a small network on latents, which
learns beside the student to rank (prediction, target, ground truth) as the expert R ranks their decoded images:

    L_proxy = sum over the pairs KL( softmax(E_i, E_j) || softmax(P_i, P_j) )

Where the distance is squared and R has slope a, each level is shifted by beta a / 2 against its target, which is the
averaged student one level below: i levels up the shift is i beta a / 2. `clean_target` takes the targets from a second
student that never sees a reward, so that the shift is beta a / 2 at every level (ours, not the paper's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...data.batch import Batch, Cond
from ...draws import Draw
from ...errors import UserError
from ...maths.scalars import Scalar, value
from ...maths.solvers import sample
from ...maths.spectrum import high_frequency_share
from ...nets.latent_reward import LatentReward, ProxySpec, neighbours, preference_rows
from ...rewards.base import Asked, Reward
from ...rewards.registry import make_reward
from ...roles import Handle, Role
from ..base import Event, Paper, Total, Update
from .lcm import LCM
from .trajectory import TrajectoryConfig

if TYPE_CHECKING:
    from ...models.denoiser import Denoiser

MEASURED_ROWS = 32  # real samples whose high frequencies those of the student are compared with


class RGLCDConfig(TrajectoryConfig):
    """Knobs of `RGLCD`. `weights`: consistency, reward (beta, a number or a schedule), plain, proxy."""

    default_weights: ClassVar[Mapping[str, Scalar]] = {"reward": 1.0}
    terms: ClassVar[tuple[str, ...]] = ("consistency", "reward", "plain", "proxy")
    reward: str | dict[str, Any] = Field(
        default="hpsv2", description="a name, or {name: {from: FOLDER, weight: 1}, ...}"
    )
    mode: Literal["direct", "proxy"] = Field(default="direct", description="whose gradient the student follows")
    reward_start: int = Field(
        default=0, ge=0, description="step at which the reward begins; a proxy learns from step 0"
    )
    reward_band: tuple[float, float] = Field(default=(0.0, 1.0), description="clock range of levels with a reward")
    reward_rows: int | None = Field(default=None, gt=0, description="rows of a micro-batch with a reward; null: all")
    clean_target: bool = Field(default=False, description="targets from a second student that sees no reward")
    proxy: ProxySpec = ProxySpec()

    @model_validator(mode="after")
    def _reward_is_sound(self) -> RGLCDConfig:
        low, high = self.reward_band
        if not 0 <= low < high <= 1:
            raise ValueError(f"reward_band={list(self.reward_band)} must increase within 0..1 (1 = noise)")
        untrained = self.mode == "proxy" and self.proxy.source is None and self.reward_start == 0
        if untrained and isinstance(self.weights["reward"], float) and self.weights["reward"] != 0:
            raise ValueError(
                "an untrained proxy pulls the student anywhere: set reward_start to the steps in which it learns alone, "
                "or proxy.from"
            )
        return self


class RGLCD(LCM):
    """Needs samples with conditions and, as the reward asks, prompts or labels; for latents, a teacher folder with its VAE."""

    name = "rg_lcd"
    paper = Paper("Reward Guided Latent Consistency Distillation", "arXiv:2403.11027")
    Config = RGLCDConfig
    plain: Denoiser
    reward: Handle
    proxy: Handle

    def roles(self) -> tuple[Role, ...]:
        """Teacher, student, the frozen reward; the reward-free student and the proxy where the config has them."""
        roles = [*super().roles(), Role("reward", build=lambda _: make_reward(self.config.reward))]
        if self.config.clean_target:
            roles.insert(2, replace(self.student_role("plain"), like="student"))
        if self.config.mode == "proxy":
            roles.append(Role("proxy", "full", build=self._proxy, defaults={"optimizer": {"lr": 3.3e-6}}))
        return tuple(roles)

    def _proxy(self, handles: Mapping[str, Handle]) -> nn.Module:
        return LatentReward.reading(handles["student"], self.config.proxy)

    def bind(self, handles: Mapping[str, Handle], sources: Mapping[str, Any], stores: Mapping[str, Any]) -> None:
        """As in `DiffusionMethod`; UserError when the reward has no derivative and mode is direct."""
        super().bind(handles, sources, stores)
        if "reward" in handles and self.config.mode == "direct" and not self.judge.differentiable:
            raise UserError(
                f"reward '{self.judge.name}' has no derivative, which mode: direct needs: write `config: {{mode: proxy}}`"
            )

    @property
    def judge(self) -> Reward:
        """The reward model itself; `self.reward` calls it in the run's precision."""
        return cast(Reward, self.reward.module)

    def on(self, event: Event) -> None:
        """Before training: one sample is decoded and judged, so that a missing VAE, prompt or label is said now."""
        if event.kind != "stage_start" or "train" not in self.sources:
            return
        if self.config.clean_target:
            self.plain.path = self.student.path  # the exported one, set after `bind`
        with torch.no_grad():
            rows = self.rows_of_data(1)
            self.reward(self.images(rows.x0), Asked.of(rows))
        _ = self.data_share

    # ---- the step

    def train_step(self, batch: Batch, draw: Draw) -> Iterator[Update | Total]:
        """The student's step; then the reward-free student's and the proxy's, on the same rows."""
        guidance, at = self.guidance(draw), self.interval(draw)
        c = self.told(batch.cond, guidance)
        x = self.noised(batch.x0, at.u, draw)
        target = self.target(self.walked(x, at, batch.cond, guidance, draw), at.u_next, c)
        prediction = self.f(self.student, x, at.u, c)
        losses, metrics = self.rewarded(prediction, at.u, batch, draw.step)
        losses = {"consistency": self.compare(prediction, target), **losses}
        x0_std = prediction.detach().flatten(1).std(1, correction=0)
        yield Update("student", losses, metrics={"x0_std": x0_std, **metrics})
        if self.config.clean_target:
            yield Update("plain", {"plain": self.compare(self.f(self.plain, x, at.u, c), target)})
        if self.config.mode == "proxy":
            yield self.proxy_update(prediction.detach(), target, batch)

    @torch.no_grad()
    def target(self, x: Tensor, u: Tensor, cond: Cond) -> Tensor:
        """f of the averaged student, or of the averaged reward-free one."""
        role = self.plain if self.config.clean_target else self.student
        with role.averaged():
            return self.f(role, x, u, cond)

    def beta(self, step: int) -> float:
        """Weight of the reward at this step; 0 before `reward_start`."""
        return value(self.config.weights["reward"], step) if step >= self.config.reward_start else 0.0

    def rewarded(
        self, prediction: Tensor, u: Tensor, batch: Batch, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The term -R [reward_rows], zero outside of the band, and metrics; nothing is decoded while beta is 0."""
        if self.beta(step) == 0:
            return {}, {}
        k = self.rewarded_rows(prediction)
        latents, u = prediction[:k], u[:k]
        if self.config.mode == "proxy":
            reward = self.proxy(latents, batch.cond[:k])[0][0]
            metrics = {"proxy_reward": reward.detach()}
        else:
            reward, images = self.judged(latents, Asked.of(batch)[:k])
            metrics = {"reward": reward.detach(), **self.high_frequency(images.detach())}
        low, high = self.config.reward_band
        inside = (u >= low) & (u <= high)
        return {"reward": torch.where(inside, -reward, torch.zeros_like(reward))}, metrics

    def rewarded_rows(self, prediction: Tensor) -> int:
        """How many rows of this micro-batch, the first ones, are judged: levels are drawn for each row alike."""
        return min(self.config.reward_rows or len(prediction), len(prediction))

    def judged(self, latents: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
        """R [rows] and the images of latents, with a graph to the latents."""
        images = self.images(latents)
        return self.reward(images, asked), images

    def images(self, latents: Tensor) -> Tensor:
        """Decoded and clamped to [-1, 1]: a pixel that is over-exposed already gets no gradient for more."""
        return self.student.decode(latents).clamp(-1, 1)

    def proxy_update(self, prediction: Tensor, target: Tensor, batch: Batch) -> Update:
        """The proxy's step on several latents a condition; the expert looks at their images without gradient."""
        k, spec = self.rewarded_rows(prediction), self.config.proxy
        shown = [prediction[:k], target[:k], batch.x0[:k]] + [neighbours(batch.x0[:k])] * spec.contrast
        latents, asked = torch.cat(shown), Asked.of(batch)[:k].repeated(len(shown))
        with torch.no_grad():
            reward, images = self.judged(latents, asked)
        reward = reward.unflatten(0, (len(shown), k))
        cosines, scale = self.proxy(latents, batch.cond[:k])
        expert = (spec.expert_scale or self.judge.logit_scale) * reward
        loss = preference_rows(scale * cosines, expert, spec.loss, spec.smooth_gt_label)
        metrics = {"reward": reward[0], "reward_data": reward[2], **self.high_frequency(images[:k])}
        return Update("proxy", {"proxy": loss}, metrics=metrics)

    # ---- what to watch

    def high_frequency(self, images: Tensor) -> dict[str, Tensor]:
        """Share of high frequencies [rows] over that of real samples: rises far above 1 when a reward is exploited."""
        if self.data_share is None or images.ndim != 4:
            return {}
        return {"high_frequency": high_frequency_share(images) / self.data_share}

    @cached_property
    def data_share(self) -> Tensor | None:
        """Mean share of high frequencies in the first real samples; None where there are no images."""
        if "train" not in self.sources or len(self.student.row_shape) != 3:
            return None
        with torch.no_grad():
            images = self.images(self.rows_of_data(MEASURED_ROWS).x0)
            return high_frequency_share(images).mean().clamp_min(1e-6)

    def rows_of_data(self, rows: int) -> Batch:
        """The first samples of the source `train`."""
        ids = torch.arange(min(rows, len(self.sources["train"])))
        return Batch(ids, self.sources["train"].fetch(ids, None)).to(self.student.device)

    def validation(self, batch: Batch) -> Mapping[str, Tensor]:
        """`reward` and `high_frequency` of the averaged student at its fewest steps, and `..._N` at each offered number."""
        scores = {steps: self.scores(batch, steps) for steps in self.steps_offered()}
        by_steps = {f"{name}_{steps}": rows for steps, said in scores.items() for name, rows in said.items()}
        return {**scores[min(scores)], **by_steps}

    @torch.no_grad()
    def scores(self, batch: Batch, steps: int) -> dict[str, Tensor]:
        """Reward and high frequencies [rows] of the averaged student's own samples; image i has noise i."""
        draw = Draw.for_images(0, batch.ids, device=self.student.device)
        schedule = self.schedule_for(steps, self.schedule().kind)
        with self.student.averaged():
            latents = sample(self.student, schedule, batch.cond, draw, self.student.row_shape)
        reward, images = self.judged(latents, Asked.of(batch))
        return {"reward": reward, **self.high_frequency(images)}
