"""Protein backbones of given lengths from a flow model, in few steps (distilled) or many (its teacher).

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    made = pipe(lengths=[100, 120], generator=torch.Generator().manual_seed(0))
    made.save("designs")          # designs/000000.pdb, ...
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

PARTS = ("transformer", "scheduler")  # whose code lies in their folders
ANGSTROM = 10.0  # in a nanometre
CIF_COLUMNS = [
    "group_PDB",
    "id",
    "type_symbol",
    "label_atom_id",
    "label_alt_id",
    "label_comp_id",
    "label_asym_id",
    "label_entity_id",
    "label_seq_id",
    "pdbx_PDB_ins_code",
    "Cartn_x",
    "Cartn_y",
    "Cartn_z",
    "occupancy",
    "B_iso_or_equiv",
    "auth_seq_id",
    "auth_asym_id",
    "pdbx_PDB_model_num",
]


@dataclass
class FewStepProteinPipelineOutput(BaseOutput):
    """Backbones, padded to the longest.

    coords_nm: CA atoms [chains, residues, 3] in nanometres, 0 in padding. mask: [chains, residues], true for residues.
    """

    coords_nm: torch.Tensor
    mask: torch.Tensor

    @property
    def coords_angstrom(self) -> torch.Tensor:
        """The same in Angstrom."""
        return ANGSTROM * self.coords_nm

    def chains(self) -> list[torch.Tensor]:
        """Each chain without padding, [residues, 3] in Angstrom."""
        return [x[m].cpu() for x, m in zip(self.coords_angstrom, self.mask)]

    def save(self, folder: Any, file_format: str = "pdb", first: int = 0) -> list[Path]:
        """Writes folder/000000.pdb (or .cif) and so on, counted from `first`; every residue is called ALA."""
        if file_format not in ("pdb", "cif"):
            raise ValueError(f"file_format={file_format!r}: write 'pdb' or 'cif'")
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = [Path(folder, f"{first + i:06d}.{file_format}") for i in range(len(self.mask))]
        for file, x in zip(files, self.chains()):
            file.write_text(pdb_text(x) if file_format == "pdb" else cif_text(x, file.stem))
        return files


class FewStepProteinPipeline(DiffusionPipeline):
    """CA backbones from noise.

    Args:
        transformer: a `ProteinFlowTransformer`, which answers data - noise.
        scheduler: `FlowMatchProteinScheduler` or `FlowMatchProteinSDEScheduler`.
        default_steps: number of steps, unless another is asked for.
        default_guidance_scale: towards a fold class, 1 = off.
    """

    model_cpu_offload_seq: Any = "transformer"
    _callback_tensor_inputs = ["latents"]
    transformer: Any
    scheduler: Any

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        default_steps: int = 16,
        default_guidance_scale: float = 1.0,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.register_to_config(default_steps=default_steps, default_guidance_scale=default_guidance_scale)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The folder's config. This class is at hand already, so the copies of these files in the folder are not run."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict):
            config["_class_name"] = cls.__name__
            if __package__ == "fewstep_pipelines":
                for name in PARTS:
                    config[name] = [f"{__package__}.{config[name][0]}", config[name][1]]
        return config

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes model_index.json and, beside it, this file, which it names; so a saved folder stays loadable."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, Path(save_directory, Path(__file__).name))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """model_index.json as text, with the class and those of its parts given as [file, class]."""
        said = json.loads(super().to_json_string())
        said["_class_name"] = [Path(__file__).stem, type(self).__name__]
        for name in PARTS:
            said[name][0] = said[name][0].split(".")[-1]
        return json.dumps(said, indent=2, sort_keys=True) + "\n"

    @torch.no_grad()
    def __call__(
        self,
        lengths: int | list[int] = 100,
        batch_size: int = 1,
        num_inference_steps: Optional[int] = None,  # noqa: UP045
        noise_scale: Optional[float] = None,  # noqa: UP045
        guidance_scale: Optional[float] = None,  # noqa: UP045
        cath: Optional[torch.Tensor] = None,  # noqa: UP045
        generator: Any = None,
        latents: Optional[torch.Tensor] = None,  # noqa: UP045
        return_dict: bool = True,
        callback_on_step_end: Optional[Callable[..., dict]] = None,  # noqa: UP045
    ) -> Any:
        """Makes chains.

        Args:
            lengths: residues of each chain; one number is repeated `batch_size` times.
            num_inference_steps: None takes what the network was distilled for.
            noise_scale: factor of the sampler's noise (standard deviation in few steps, variance in the teacher's
                sampler); None takes the scheduler's. Lower is more regular and less diverse.
            guidance_scale: towards the fold class, 1 = off; None takes the default.
            cath: fold labels [chains, 3], 0 = not known.
            generator: one, or one a chain, which makes a chain independent of its batch.
            latents: unit normal noise [chains, residues, 3] to start from.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": state}); may return a new state.

        Returns:
            `FewStepProteinPipelineOutput`, or `(coords_nm, mask)` when `return_dict` is False.
        """
        lengths = [lengths] * batch_size if isinstance(lengths, int) else list(lengths)
        guidance_scale = self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale
        self._check(lengths, guidance_scale, cath, generator)
        device = self._execution_device
        mask = torch.arange(max(lengths), device=device)[None] < torch.tensor(lengths, device=device)[:, None]
        self.scheduler.set_noise_scale(noise_scale)
        self.scheduler.set_timesteps(num_inference_steps or self.config["default_steps"], device=device)
        x = self._start(mask, generator, latents)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            u = self._predict(x, t, mask, cath, guidance_scale)
            x = self.scheduler.step(u, t, x, generator=generator, return_dict=False)[0]
            x = centred(x, mask)
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, t, {"latents": x}).get("latents", x)
        self.maybe_free_model_hooks()
        return FewStepProteinPipelineOutput(x, mask) if return_dict else (x, mask)

    def _check(self, lengths: list, guidance_scale: float, cath: Any, generator: Any) -> None:
        config = self.transformer.config
        low, high = config.get("shortest", 1), config.get("longest", max(lengths, default=0))
        unfit = [n for n in lengths if not low <= n <= high]
        if unfit or not lengths:
            raise ValueError(f"lengths={unfit}: this model makes chains of {low} to {high} residues")
        if guidance_scale != 1 and cath is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs fold labels in `cath`: use 1")
        if cath is not None and tuple(cath.shape) != (len(lengths), 3):
            raise ValueError(f"cath has shape {tuple(cath.shape)}, not {(len(lengths), 3)}")
        if isinstance(generator, list) and len(generator) != len(lengths):
            raise ValueError(f"{len(generator)} generators do not fit {len(lengths)} chains")

    def _start(self, mask: torch.Tensor, generator: Any, noise: Any) -> torch.Tensor:
        shape = (*mask.shape, 3)
        if noise is None:
            noise = randn_tensor(shape, generator=generator, device=mask.device, dtype=torch.float32)
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents have shape {tuple(noise.shape)}, not {shape}")
        return centred(noise.to(mask.device, torch.float32) * self.scheduler.init_noise_sigma, mask)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor, cath: Any, scale: float) -> torch.Tensor:
        """u, centred; guided: unknown fold + scale (fold - unknown fold)."""
        dtype = self.transformer.dtype
        tau = (1 - t).expand(len(x))
        u = self.transformer(x.to(dtype), tau, mask, cath=None if cath is None else cath.to(x.device)).float()
        if scale != 1:
            free = self.transformer(x.to(dtype), tau, mask).float()
            u = free + scale * (u - free)
        return centred(u, mask)


def centred(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x with mean 0 over the residues of `mask`, and 0 elsewhere."""
    weight = mask.to(x.dtype)[..., None]
    mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return (x - mean) * weight


def pdb_text(x: torch.Tensor) -> str:
    """A PDB file of one chain of CA atoms [residues, 3] in Angstrom."""
    line = "ATOM  {0:5d}  CA  ALA A{0:4d}    {1:8.3f}{2:8.3f}{3:8.3f}  1.00  0.00           C  "
    atoms = [line.format(i, *place) for i, place in enumerate(x.tolist(), 1)]
    return "\n".join([*atoms, f"TER   {len(atoms) + 1:5d}      ALA A{len(atoms):4d}", "END", ""])


def cif_text(x: torch.Tensor, name: str) -> str:
    """An mmCIF file of one chain of CA atoms [residues, 3] in Angstrom."""
    head = [f"data_{name}", "#", "loop_", *(f"_atom_site.{column}" for column in CIF_COLUMNS)]
    row = "ATOM {0} C CA . ALA A 1 {0} ? {1:.3f} {2:.3f} {3:.3f} 1.00 0.00 {0} A 1"
    return "\n".join([*head, *(row.format(i, *place) for i, place in enumerate(x.tolist(), 1)), "#", ""])
