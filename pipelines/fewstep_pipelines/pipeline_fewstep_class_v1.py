"""Few-step images from class labels, or from nothing: pixel and latent networks, flow or variance preserving.

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    image = pipe(class_labels=[3], generator=torch.Generator().manual_seed(0)).images[0]
"""

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
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
        default_steps: number of steps the network was distilled for.
        default_guidance_scale: classifier-free guidance it wants at sampling time; 1 is off.
        start: flow networks: the first sigma before shifting. Below 1 the first state is that sigma times noise, without signal.
    """

    model_cpu_offload_seq: Any = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]
    _callback_tensor_inputs = ["latents"]
    scheduler: Any  # the components; `register_modules` sets them
    unet: Any
    transformer: Any
    vae: Any

    def __init__(  # diffusers 0.36 reads Optional[X] here, not X | None
        self,
        scheduler: SchedulerMixin,
        unet: Optional[UNet2DModel] = None,  # noqa: UP045
        transformer: Optional[DiTTransformer2DModel] = None,  # noqa: UP045
        vae: Optional[AutoencoderKL] = None,  # noqa: UP045
        default_steps: int = 4,
        default_guidance_scale: float = 1.0,
        start: float = 1.0,
    ):
        super().__init__()
        if (unet is None) == (transformer is None):
            raise ValueError("give exactly one of `unet` and `transformer`")
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        self.register_to_config(default_steps=default_steps, default_guidance_scale=default_guidance_scale)
        self.register_to_config(start=start)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The folder's config. This class is at hand already, so the copy of this file in the folder is not run."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict):
            config["_class_name"] = cls.__name__
        return config

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes model_index.json and, beside it, this file, which it names; so a saved folder stays loadable."""
        file = Path(inspect.getfile(type(self)))
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, Path(save_directory, file.name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """model_index.json as text, with the class given as [file, class]."""
        name = type(self).__name__
        file = Path(inspect.getfile(type(self))).stem
        return super().to_json_string().replace(f'"_class_name": "{name}"', f'"_class_name": ["{file}", "{name}"]')

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
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            output = self._predict(latents, t, labels, scale)
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

    def _predict(self, x: torch.Tensor, t: torch.Tensor, labels: Any, scale: float) -> torch.Tensor:
        """The network's output at one level, guided: none + scale * (class - none), both in one call."""
        channels = x.shape[1]
        x = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
        if scale == 1:
            return self._call(x, t, labels)[:, :channels]
        labels = torch.cat([torch.full_like(labels, self.classes), labels])
        free, tied = self._call(torch.cat([x, x]), t, labels)[:, :channels].chunk(2)
        return free + scale * (tied - free)

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


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
