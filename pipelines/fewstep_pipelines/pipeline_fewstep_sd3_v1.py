"""Few-step Stable Diffusion 3: the stock pipeline on the levels of any N, telling a second time.

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    image = pipe("a photo of a cat", generator=torch.Generator().manual_seed(0)).images[0]
"""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

Generators = torch.Generator | list[torch.Generator] | None


def _joined(ours: Callable[..., Any], theirs: Callable[..., Any]) -> inspect.Signature:
    """Their parameters and our own: diffusers reads a pipeline's parts off the signature."""
    own = [p for p in inspect.signature(ours).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return inspect.Signature([*inspect.signature(theirs).parameters.values(), *own])


class FewStepSD3Pipeline(StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` on the sigmas 1, 1-1/N, ..., 1/N, which its flow-matching scheduler then shifts.

    Args:
        times: what a network with two times reads the second one with, a `FewStepTimes`; None for networks with one.
        default_steps: number of steps the network was distilled for.
        default_guidance_scale: classifier-free guidance it wants at sampling time; 1 is off.
        target: the second time s that `times` is told in a step from t: the "next" level, "zero", or the "same" t.
        last: of "next": what the last step, which ends at 0, is told, as a share of its t.
        rescale: "energy" gives the guided clean image the norm of the conditional one.
        start: the first sigma before shifting. Below 1 the first state is that sigma times noise, without signal.
        parts: as for `StableDiffusion3Pipeline`.
    """

    _optional_components = [*StableDiffusion3Pipeline._optional_components, "times"]
    times: Any

    def __init__(  # diffusers 0.36 reads Optional[X] here, not X | None
        self,
        *,
        times: Optional[ModelMixin] = None,  # noqa: UP045
        default_steps: int = 4,
        default_guidance_scale: float = 1.0,
        target: Optional[str] = None,  # noqa: UP045
        last: float = 0.0,
        rescale: Optional[str] = None,  # noqa: UP045
        start: float = 1.0,
        **parts: Any,
    ):
        super().__init__(**parts)
        if target not in (None, "next", "zero", "same") or rescale not in (None, "energy"):
            raise ValueError(f"target={target!r}, rescale={rescale!r}: write next, zero or same, and energy, or None")
        self.register_modules(times=times)
        self.register_to_config(default_steps=default_steps, default_guidance_scale=default_guidance_scale)
        self.register_to_config(target=target, last=last, rescale=rescale, start=start)

    __init__.__signature__ = _joined(__init__, StableDiffusion3Pipeline.__init__)  # type: ignore[attr-defined]

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The folder's config. This class is at hand already, so the copy of this file in the folder is not run.

        Nor is that of `FewStepTimes`, when this class is the installed one.
        """
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict):
            config["_class_name"] = cls.__name__
            file, name = config.get("times") or (None, None)
            if file is not None and __package__ == "fewstep_pipelines":
                config["times"] = [f"{__package__}.{file}", name]
        return config

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes model_index.json and, beside it, this file, which it names; so a saved folder stays loadable."""
        file = Path(inspect.getfile(type(self)))
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, Path(save_directory, file.name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """model_index.json as text, with the class given as [file, class], as that of `times` is."""
        said = json.loads(super().to_json_string())
        said["_class_name"] = [Path(inspect.getfile(type(self))).stem, type(self).__name__]
        if self.times is not None:
            said["times"][0] = said["times"][0].split(".")[-1]
        return json.dumps(said, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        **more: Any,
    ) -> Any:
        """Generates images; num_inference_steps, guidance_scale: None takes what the network was distilled for.

        generator: also of the noise that a stochastic scheduler adds. The rest is as for `StableDiffusion3Pipeline`.
        """
        steps = self.config["default_steps"] if num_inference_steps is None else num_inference_steps
        scale = self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale
        more = {"sigmas": self._sigmas(steps), **more}
        more |= {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": scale}
        with self._stepping(generator, scale):
            return super().__call__(prompt, generator=generator, **more)

    def _sigmas(self, steps: int) -> list[float]:
        return [self.config["start"] * (1 - i / steps) for i in range(steps)]

    def prepare_latents(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Noise, times the first sigma where that is below 1."""
        latents, start = super().prepare_latents(*args, **kwargs), self.config["start"]
        shift = self.scheduler.config.shift
        return latents if start == 1 else latents * (shift * start / (1 + (shift - 1) * start))

    @contextmanager
    def _stepping(self, generator: Generators, scale: float) -> Iterator[None]:
        """The block in which the network is told second times, and steps draw from `generator`."""
        call = ExitStack()

        def tell(network: Any, _args: Any) -> None:
            if self.times is not None:
                t, s = self._two_times()
                call.enter_context(self.times.feeding(network, t, s=s))

        hooks = [self.transformer.register_forward_pre_hook(tell)]
        hooks.append(self.transformer.register_forward_hook(lambda *_: call.close(), always_call=True))
        if self.config["rescale"] == "energy" and scale > 1:
            hooks.append(self.transformer.register_forward_hook(partial(self._rescaled, scale), with_kwargs=True))
        self.scheduler.step = partial(self.scheduler.step, generator=generator)
        try:
            yield
        finally:
            del self.scheduler.step
            for hook in hooks:
                hook.remove()

    def _two_times(self) -> tuple[torch.Tensor, torch.Tensor]:
        """t and s [1] of the step that the scheduler is in."""
        i, levels = self.scheduler.step_index or 0, self.scheduler.sigmas.to(self._execution_device)
        t, s = levels[i : i + 1], levels[i + 1 : i + 2]
        if self.config["target"] == "next":
            return t, s if i + 1 < len(self.scheduler.timesteps) else self.config["last"] * t
        return t, t * (self.config["target"] != "zero")

    def _rescaled(self, scale: float, _network: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Twice the output that gives the guided x0 = x - t v, row by row, the norm of the conditional one."""
        free, tied = output[0].float().chunk(2)
        x = (args[0] if args else kwargs["hidden_states"])[: len(tied)].float()
        v = self._same_norm(x, free + scale * (tied - free), tied)
        return (torch.cat([v, v]).to(output[0].dtype), *output[1:])

    def _same_norm(self, x: torch.Tensor, guided: torch.Tensor, tied: torch.Tensor) -> torch.Tensor:
        """The velocity whose clean image is that of `guided`, with the norm of that of `tied`, row by row."""
        t = self._two_times()[0]
        clean = [x - t * v for v in (tied, guided)]
        norms = [image.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1)) for image in clean]
        return (x - clean[1] * (norms[0] / norms[1].clamp_min(1e-6))) / t
