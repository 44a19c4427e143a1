"""Few-step images from class labels, or from nothing: pixel and latent networks, flow or variance preserving.

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    image = pipe(class_labels=[3], generator=torch.Generator().manual_seed(0)).images[0]
"""

import inspect
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

Generators = torch.Generator | list[torch.Generator] | None


class FewStepClassPipeline(DiffusionPipeline):
    """Class-conditional or unconditional generation in few steps.

    Args:
        scheduler: of diffusers; flow-matching ones are given the sigmas 1, 1-1/N, ..., 1/N, which they then shift.
        unet: a `UNet2DModel`; its last class embedding stands for "no class".
        transformer: a `DiTTransformer2DModel`, in place of `unet`.
        vae: decodes latents; None for networks that work on pixels.
        times: what a network with two times reads the second one with, a `FewStepTimes`.
        default_steps: number of steps the network was distilled for.
        default_guidance_scale: classifier-free guidance it wants at sampling time; 1 is off.
        start: flow networks: the first sigma before shifting. Below 1 the first state is that sigma times noise, without signal.
        target: the second time s that `times` is told in a step from t: the "next" level, "zero", or the "same" t.
        last: of "next": what the last step, which ends at 0, is told, as a share of its t.
        rescale: "energy" gives the guided clean image the norm of the conditional one.
    """

    model_cpu_offload_seq: Any = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae", "times"]
    _callback_tensor_inputs = ["latents"]
    scheduler: Any  # the components; `register_modules` sets them
    unet: Any
    transformer: Any
    vae: Any
    times: Any

    def __init__(  # diffusers 0.36 reads Optional[X] here, not X | None
        self,
        scheduler: SchedulerMixin,
        unet: Optional[UNet2DModel] = None,  # noqa: UP045
        transformer: Optional[DiTTransformer2DModel] = None,  # noqa: UP045
        vae: Optional[AutoencoderKL] = None,  # noqa: UP045
        default_steps: int = 4,
        default_guidance_scale: float = 1.0,
        start: float = 1.0,
        times: Optional[ModelMixin] = None,  # noqa: UP045
        target: Optional[str] = None,  # noqa: UP045
        last: float = 0.0,
        rescale: Optional[str] = None,  # noqa: UP045
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("give exactly one of `unet` and `transformer`")
        if target not in (None, "next", "zero", "same") or rescale not in (None, "energy"):
            raise ValueError(f"target={target!r}, rescale={rescale!r}: write next, zero or same, and energy, or None")
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae, times=times)
        self.register_to_config(default_steps=default_steps, default_guidance_scale=default_guidance_scale)
        self.register_to_config(start=start, target=target, last=last, rescale=rescale)

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

    @property
    def network(self) -> Any:
        """The denoising network, `unet` or `transformer`."""
        return self.unet if self.unet is not None else self.transformer

    @property
    def classes(self) -> Any:
        """Number of classes, None for an unconditional network. The label after the last one means "no class"."""
        if self.transformer is not None:
            return self.transformer.config.num_embeds_ada_norm
        embeddings = self.unet.config.num_class_embeds
        return None if embeddings is None else embeddings - 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
            class_labels: one label, or one for each image; None draws them (and is the only choice without classes).
            batch_size: number of images, when `class_labels` does not say it.
            num_inference_steps, guidance_scale: None takes what the network was distilled for.
            generator: one generator, or one for each image, which makes an image independent of its batch.
            latents: unit normal noise [images, channels, size, size] to start from, in place of drawn noise.
            output_type: "pil", "np" [images, height, width, channels] or "pt" [images, channels, height, width].
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": latents}); may return new latents.

        Returns:
            `ImagePipelineOutput`, or `(images,)` when `return_dict` is False.
        """
        steps = self.config["default_steps"] if num_inference_steps is None else num_inference_steps
        scale = self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale
        self._check(output_type, scale)
        labels = self._labels(class_labels, batch_size, generator)
        rows = batch_size if labels is None else len(labels)

        latents = self._start(rows, generator, latents)
        self._set_timesteps(steps)
        latents = latents if self._begins == 1 else latents * self.scheduler.sigmas[0]
        extra = {"generator": generator} if _takes(self.scheduler.step, "generator") else {}
        levels = self._levels()
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            with self._telling(levels, i):
                output = self._predict(latents, t, labels, scale, levels[i : i + 1])
            latents = self.scheduler.step(output, t, latents, return_dict=False, **extra)[0]
            if callback_on_step_end is not None:
                names = callback_on_step_end_tensor_inputs or self._callback_tensor_inputs
                latents = callback_on_step_end(self, i, t, {n: latents for n in names}).get("latents", latents)

        images = self._images(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, output_type: str, guidance_scale: float) -> None:
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type={output_type!r}: write 'pil', 'np' or 'pt'")
        if guidance_scale != 1 and self.classes is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs a network with classes: use 1")

    def _labels(self, labels: Any, batch_size: int, generator: Generators) -> torch.Tensor | None:
        """[images] int64 on the network's device, or None for a network without classes."""
        if self.classes is None:
            if labels is not None:
                raise ValueError("this network has no classes: leave `class_labels` out")
            return None
        if labels is None:
            first = generator[0] if isinstance(generator, list) else generator
            device = "cpu" if first is None else first.device
            labels = torch.randint(self.classes, (batch_size,), generator=first, device=device)
        labels = torch.as_tensor(labels, dtype=torch.long, device=self._execution_device).reshape(-1)
        if batch_size != 1 and len(labels) not in (1, batch_size):
            raise ValueError(f"batch_size={batch_size} does not fit {len(labels)} class labels")
        return labels.repeat(batch_size) if len(labels) == 1 else labels

    def _start(self, rows: int, generator: Generators, noise: torch.Tensor | None) -> torch.Tensor:
        """The scheduler's first state from given or drawn noise, in float32 whatever the network runs in."""
        config = self.network.config
        size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
        shape = (rows, config.in_channels, *size)
        if isinstance(generator, list) and len(generator) != rows:
            raise ValueError(f"{len(generator)} generators do not fit {rows} images")
        if noise is None:
            noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents have shape {tuple(noise.shape)}, the network wants {shape}")
        return noise.to(self._execution_device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @property
    def _begins(self) -> float:
        """The config's `start`; 1 in folders that were written before there was one."""
        return self.config.get("start", 1.0)

    def _set_timesteps(self, steps: int) -> None:
        """Flow-matching schedulers would waste their last step on sigma_min if they were told the number alone."""
        device = self._execution_device
        if type(self.scheduler).__name__.startswith("FlowMatch") and _takes(self.scheduler.set_timesteps, "sigmas"):
            self.scheduler.set_timesteps(sigmas=[self._begins * (1 - i / steps) for i in range(steps)], device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _levels(self) -> list[float]:
        """Flow times of all steps, and the 0 at which the last one ends; empty when nothing asks for them."""
        if self.times is None and self.config.get("rescale") is None:
            return []
        labels = self.scheduler.timesteps
        if self._flows:
            return [*self.scheduler.sigmas[: len(labels)].tolist(), 0.0]
        abar = self.scheduler.alphas_cumprod.double()[labels.long().cpu()]
        return [*torch.sigmoid((torch.log1p(-abar) - torch.log(abar)) / 2).tolist(), 0.0]

    @property
    def _flows(self) -> bool:
        """Whether the scheduler steps in flow times."""
        config = self.scheduler.config
        return type(self.scheduler).__name__.startswith("Flow") or bool(config.get("use_flow_sigmas"))

    def _telling(self, levels: list[float], i: int) -> Any:
        """The block in which the network is told the second time of step i."""
        if self.times is None:
            return nullcontext()
        t, following, target = levels[i], levels[i + 1], self.config.get("target") or "same"
        last = following if following > 0 else self.config.get("last", 0.0) * t
        told = (t, {"next": last, "zero": 0.0, "same": t}[target])
        times = [torch.full((1,), time, device=self._execution_device) for time in told]
        return self.times.feeding(self.network, times[0], s=times[1])

    def _predict(self, x: torch.Tensor, t: torch.Tensor, labels: Any, scale: float, level: list[float]) -> torch.Tensor:
        """The network's output at one level, guided: none + scale * (class - none), both in one call."""
        channels = x.shape[1]
        x = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
        if scale == 1:
            return self._call(x, t, labels)[:, :channels]
        labels = torch.cat([torch.full_like(labels, self.classes), labels])
        free, tied = self._call(torch.cat([x, x]), t, labels)[:, :channels].chunk(2)
        output = free + scale * (tied - free)
        return output if self.config.get("rescale") is None else self._rescaled(output, tied, x, level[0])

    def _rescaled(self, output: torch.Tensor, tied: torch.Tensor, x: torch.Tensor, level: float) -> torch.Tensor:
        """The output whose clean image x0 = a x + b output has, row by row, the norm of that of `tied`."""
        a, b = _clean("flow" if self._flows else self.scheduler.config.prediction_type, level)
        guided, conditional = a * x + b * output, a * x + b * tied
        norms = [image.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1)) for image in (conditional, guided)]
        return (guided * (norms[0] / norms[1].clamp_min(1e-6)) - a * x) / b

    def _call(self, x: torch.Tensor, t: torch.Tensor, labels: Any) -> torch.Tensor:
        x, t = x.to(self.network.dtype), t.expand(len(x))
        conditions = {} if labels is None else {"class_labels": labels}
        return self.network(x, timestep=t, return_dict=False, **conditions)[0].float()

    def _images(self, latents: torch.Tensor, output_type: str) -> Any:
        if self.vae is not None:
            config = self.vae.config
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
            latents = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        pixels = images.cpu().permute(0, 2, 3, 1).numpy()
        return pixels if output_type == "np" else self.numpy_to_pil(pixels)


def _clean(prediction: str, t: float) -> tuple[float, float]:
    """(a, b) of the clean image a x + b output at flow time t, x being what the scheduler steps."""
    alpha, sigma = (part / ((1 - t) ** 2 + t**2) ** 0.5 for part in (1 - t, t))
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    return {"flow": (1.0, -t), "v_prediction": (alpha, -sigma), "sample": (0.0, 1.0)}[prediction]


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
