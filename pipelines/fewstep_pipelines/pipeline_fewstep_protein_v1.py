"""Protein backbones of given lengths from a flow model, in few steps (distilled) or many (its teacher).

This file travels inside the checkpoint folder and needs torch and diffusers only. An incompatible change gets a new
file name (v2), so that old folders keep the code they were written with.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    made = pipe(lengths=[100, 120], generator=torch.Generator().manual_seed(0))
    made.save("designs")          # designs/000000.pdb, ...
"""

import json
import math
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

PARTS = ("transformer", "scheduler")  # whose code lies in their folders
FORMATS = ("pdb", "cif")
ANGSTROM = 10.0  # in a nanometre
PDB_RESIDUES, PDB_LOWEST, PDB_HIGHEST = 9999, -999.999, 9999.999  # what its columns hold
CIF_ENTITY = (
    "_entity.id 1",
    "_entity.type polymer",
    "_entity_poly.entity_id 1",
    "_entity_poly.type polypeptide(L)",
    "_struct_asym.id A",
    "_struct_asym.entity_id 1",
    "#",
)
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
    "auth_comp_id",
    "auth_asym_id",
    "auth_atom_id",
    "pdbx_PDB_model_num",
]


@dataclass
class FewStepProteinPipelineOutput(BaseOutput):
    """Backbones, padded to the longest; tensors, or arrays where the pipeline was asked for "np".

    coords_nm: CA atoms [chains, residues, 3] in nanometres, 0 in padding. mask: [chains, residues], true for residues.
    """

    coords_nm: Any
    mask: Any

    @property
    def coords_angstrom(self) -> Any:
        """The same in Angstrom."""
        return ANGSTROM * self.coords_nm

    def chains(self) -> list:
        """Each chain without padding, [residues, 3] in Angstrom."""
        return [x[m] for x, m in zip(self.coords_angstrom, self.mask)]

    def save(self, folder: Any, file_format: str = "pdb", first: int = 0) -> list[Path]:
        """Writes the chains by `write_chains`."""
        return write_chains(self.chains(), folder, file_format, first)


class FewStepProteinPipeline(DiffusionPipeline):
    """CA backbones from noise.

    Args:
        transformer: a `ProteinFlowTransformer`, which answers data - noise.
        scheduler: `FlowMatchProteinScheduler` or `FlowMatchProteinSDEScheduler`.
        default_steps: number of steps, unless another is asked for.
        default_guidance_scale: towards a fold class, 1 = off.
    """

    model_cpu_offload_seq: Any = "transformer"
    _callback_tensor_inputs = ["latents", "clean"]
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
                    file, part = config.get(name) or (None, None)
                    if file not in (None, "diffusers"):
                        config[name] = [f"{__package__}.{file}", part]
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
            if said[name][0] is not None:
                said[name][0] = said[name][0].split(".")[-1]
        return json.dumps(said, indent=2, sort_keys=True) + "\n"

    @property
    def num_timesteps(self) -> int:
        """Steps of the run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether to stop after this step; a callback may set `pipeline._interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        lengths: int | list[int] = 100,
        batch_size: int = 1,
        num_inference_steps: Optional[int] = None,  # noqa: UP045
        noise_scale: Optional[float] = None,  # noqa: UP045
        guidance_scale: Optional[float] = None,  # noqa: UP045
        cath: Optional[torch.Tensor] = None,  # noqa: UP045
        self_conditioning: bool = False,
        sigmas: Optional[list[float]] = None,  # noqa: UP045
        generator: Any = None,
        latents: Optional[torch.Tensor] = None,  # noqa: UP045
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Optional[Callable[..., Any]] = None,  # noqa: UP045
        callback_on_step_end_tensor_inputs: Optional[list[str]] = None,  # noqa: UP045
    ) -> Any:
        """Makes chains.

        Args:
            lengths: residues of each chain; one number is repeated `batch_size` times.
            num_inference_steps: None takes what the network was distilled for.
            noise_scale: factor of the sampler's noise (standard deviation in few steps, variance in the teacher's
                sampler); None takes the scheduler's. Lower is more regular and less diverse.
            guidance_scale: towards the fold class, 1 = off; None takes the default.
            cath: fold labels [chains, 3], 0 = not known.
            self_conditioning: tell the network the clean chain it predicted in the step before, if it knows such an
                input. Students are distilled without.
            sigmas: noise levels t to visit in place of the scheduler's own, decreasing.
            generator: one, or one a chain, which makes a chain independent of its batch.
            latents: unit normal noise [chains, residues, 3] to start from.
            output_type: "pt" or "np".
            callback_on_step_end: called as f(pipeline, step, timestep, tensors); may return a new "latents". tensors
                holds what `callback_on_step_end_tensor_inputs` names: "latents" (state at the next level, nanometres)
                and "clean" (the predicted chain); default "latents" alone.

        Returns:
            `FewStepProteinPipelineOutput`, or `(coords_nm, mask)` when `return_dict` is False.
        """
        lengths = _listed(lengths, batch_size)
        scale = self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale
        told = callback_on_step_end_tensor_inputs or ["latents"]
        self._check(lengths, scale, cath, self_conditioning, output_type, told)
        device = self._execution_device
        mask = torch.arange(max(lengths), device=device)[None] < torch.tensor(lengths, device=device)[:, None]
        known = {} if cath is None else {"cath": torch.as_tensor(cath, device=device)}
        self._begin(num_inference_steps, sigmas, noise_scale)
        x = self._start(mask, generator, latents)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            u = self._predict(x, t, mask, known, scale)
            x, clean = self.scheduler.step(u, t, x, generator=generator, return_dict=False, mask=mask)
            x, clean = centred(x, mask), centred(clean, mask)
            if self_conditioning:
                known["x_self"] = clean
            if callback_on_step_end is not None:
                tensors = {"latents": x, "clean": clean}
                answer = callback_on_step_end(self, i, t, {name: tensors[name] for name in told})
                x = (answer or {}).get("latents", x)
            if self.interrupt:
                break
        self.maybe_free_model_hooks()
        made = (x.cpu().numpy(), mask.cpu().numpy()) if output_type == "np" else (x, mask)
        return FewStepProteinPipelineOutput(*made) if return_dict else made

    def _check(
        self, lengths: list, scale: float, cath: Any, self_conditioning: bool, output_type: str, told: list
    ) -> None:
        config = self.transformer.config
        low, high = config.get("shortest") or 1, config.get("longest") or math.inf
        unfit = sorted({n for n in lengths if not low <= n <= high})
        if unfit or not lengths:
            makes = f"{low} to {high} residues" if high < math.inf else f"{low} residues or more"
            raise ValueError(f"lengths={unfit}: this model makes chains of {makes}")
        if scale != 1 and cath is None:
            raise ValueError(f"guidance_scale={scale} needs fold labels in `cath`: use 1")
        if cath is not None:
            self._check_folds(torch.as_tensor(cath), len(lengths))
        if self_conditioning and not config.get("self_conditioning"):
            raise ValueError("this network has no input for a chain predicted before: leave self_conditioning off")
        if output_type not in ("pt", "np"):
            raise ValueError(f"output_type={output_type!r}: write 'pt' or 'np'")
        if not set(told) <= set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs={told}: there are {self._callback_tensor_inputs}")

    def _check_folds(self, cath: torch.Tensor, chains: int) -> None:
        classes = list(self.transformer.config.get("cath_classes") or ())
        if not classes:
            raise ValueError("this network knows no fold classes: leave `cath` out")
        if tuple(cath.shape) != (chains, len(classes)):
            raise ValueError(f"cath has shape {tuple(cath.shape)}, not {(chains, len(classes))}")
        if bool((cath < 0).any()) or bool((cath.cpu() > torch.tensor(classes)).any()):
            raise ValueError(f"cath holds labels beyond 0 (not known) and 1 to {classes} at its levels")

    def _begin(self, steps: Any, sigmas: Any, noise_scale: Any) -> None:
        if sigmas is None and steps is None:
            steps = self.config["default_steps"]
        self.scheduler.set_noise_scale(noise_scale)
        self.scheduler.set_timesteps(steps, device=self._execution_device, sigmas=sigmas)
        self._num_timesteps = len(self.scheduler.timesteps)
        self._interrupt = False

    def _start(self, mask: torch.Tensor, generator: Any, noise: Any) -> torch.Tensor:
        """The first state, in float32 whatever the network runs in."""
        like = torch.zeros(*mask.shape, 3, device=mask.device)
        if noise is None:
            noise = self.scheduler.draw(like, generator, mask)
        if noise.shape != like.shape:
            raise ValueError(f"latents have shape {tuple(noise.shape)}, not {tuple(like.shape)}")
        return centred(noise.to(like) * self.scheduler.init_noise_sigma, mask)

    def _predict(self, x: torch.Tensor, t: torch.Tensor, mask: torch.Tensor, known: dict, scale: float) -> torch.Tensor:
        """u, centred; guided: unknown fold + scale (fold - unknown fold)."""
        tau, dtype = (1 - t).expand(len(x)), self.transformer.dtype
        if "x_self" in known:
            known = {**known, "x_self": known["x_self"].to(dtype)}
        u = self.transformer(x.to(dtype), tau, mask, **known).float()
        if scale != 1:
            unknown = {name: value for name, value in known.items() if name != "cath"}
            free = self.transformer(x.to(dtype), tau, mask, **unknown).float()
            u = free + scale * (u - free)
        return centred(u, mask)


def centred(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x with mean 0 over the residues of `mask`, and 0 elsewhere."""
    weight = mask.to(x.dtype)[..., None]
    mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return (x - mean) * weight


def write_chains(chains: Any, folder: Any, file_format: str = "pdb", first: int = 0) -> list[Path]:
    """Writes folder/000000.pdb (or .cif) and so on, counted from `first`; every residue is called ALA.

    chains: CA atoms [residues, 3] each, in Angstrom. ValueError, before anything is written, for a chain that the format
    cannot hold.
    """
    if file_format not in FORMATS:
        raise ValueError(f"file_format={file_format!r}: write 'pdb' or 'cif'")
    text = pdb_text if file_format == "pdb" else cif_text
    names = [f"{first + i:06d}" for i in range(len(chains))]
    texts = [text(x, name) for x, name in zip(chains, names)]
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = [Path(folder, f"{name}.{file_format}") for name in names]
    for file, written in zip(files, texts):
        file.write_text(written)
    return files


def pdb_text(x: Any, name: str = "chain") -> str:
    """A PDB file of one chain of CA atoms [residues, 3] in Angstrom.

    ValueError for coordinates that are no numbers, and for what the format's columns cannot hold: more than 9,999
    residues, or coordinates beyond -999.999 .. 9999.999.
    """
    places = _numbers(x, name)
    far = [v for place in places for v in place if not PDB_LOWEST <= round(v, 3) <= PDB_HIGHEST]
    if far or len(places) > PDB_RESIDUES:
        what = f"a coordinate of {far[0]:.0f} Angstrom" if far else f"{len(places)} residues"
        raise ValueError(f"chain {name}: a PDB file cannot hold {what}: write 'cif'")
    line = "ATOM  {0:5d}  CA  ALA A{0:4d}    {1:8.3f}{2:8.3f}{3:8.3f}  1.00  0.00           C  "
    atoms = [line.format(i, *place) for i, place in enumerate(places, 1)]
    return "\n".join([*atoms, f"TER   {len(atoms) + 1:5d}      ALA A{len(atoms):4d}", "END", ""])


def cif_text(x: Any, name: str = "chain") -> str:
    """An mmCIF file of one chain of CA atoms [residues, 3] in Angstrom. ValueError for coordinates that are no numbers."""
    head = [f"data_{name}", f"_entry.id {name}", *CIF_ENTITY, "loop_", *(f"_atom_site.{c}" for c in CIF_COLUMNS)]
    row = "ATOM {0} C CA . ALA A 1 {0} ? {1:.3f} {2:.3f} {3:.3f} 1.00 0.00 {0} ALA A CA 1"
    return "\n".join([*head, *(row.format(i, *place) for i, place in enumerate(_numbers(x, name), 1)), "#", ""])


def _numbers(x: Any, name: str) -> list:
    places = x.tolist()
    if not all(math.isfinite(value) for place in places for value in place):
        raise ValueError(f"chain {name} has coordinates that are no numbers: nothing to write")
    return places


def _listed(lengths: Any, batch_size: int) -> list:
    if not hasattr(lengths, "__iter__"):
        return [int(lengths)] * batch_size
    lengths = [int(n) for n in lengths]
    if batch_size not in (1, len(lengths)):
        raise ValueError(f"batch_size={batch_size} does not fit {len(lengths)} lengths")
    return lengths
