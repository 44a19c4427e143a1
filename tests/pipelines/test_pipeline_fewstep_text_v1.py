"""Text pipelines that a two-time checkpoint carries, against the rollouts that students are trained with."""

from __future__ import annotations

import ast
import copy
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep_pipelines
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from fewstep_pipelines import FewStepTimes
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.draws import Draw
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import addresses
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Schedule, sample

from ..models.flow_stock import PROMPTS, student
from ..models.stock import pretrained
from ..models.tiny_qwen_image import tiny_qwen_image
from ..models.tiny_sana import tiny_sana
from ..models.tiny_sd3 import tiny_sd3

SIZE = {"sd3": 16, "sana": 32, "qwen": 16}  # pixels
CLASSES = {
    "sd3": fewstep_pipelines.FewStepSD3Pipeline,
    "sana": fewstep_pipelines.FewStepSanaPipeline,
    "qwen": fewstep_pipelines.FewStepQwenImagePipeline,
}
SCHEDULERS = {"ode": FlowMatchEulerDiscreteScheduler, "renoise": FlowMatchLCMScheduler}
NAMES = tuple(CLASSES)


class Trained:
    """A student with two times of a tiny pipeline's network, and its parts as `FewStepTimes` and a stock network."""

    def __init__(self, folder: Path):
        self.stock = pretrained(folder)
        self.role = student(folder, adds=("s",), moved=0.05)
        self.role.path = FlowPath(shift=3.0)
        self.role.row_shape = (4, 8, 8)
        weights = self.role.module.state_dict()
        extra = self.role.module.get_submodule("extra_inputs")
        place = self.role.family.facts.time_embedding
        self.times = FewStepTimes(("s",), next(iter(extra.embeddings["s"][2].parameters())).shape[0], place)
        self.times.load_state_dict(extra.state_dict())
        self.network = copy.deepcopy(self.stock.transformer)
        self.network.load_state_dict({name: w for name, w in weights.items() if not name.startswith("extra_inputs")})

    def schedule(self, kind: str, steps: int, **said: Any) -> Schedule:
        return Schedule(kind, self.role.path.grid(steps), **said)

    @torch.no_grad()
    def images(self, schedule: Schedule) -> Tensor:
        """As training makes them [rows, 3, height, width], in 0..1."""
        cond = self.role.around.prompts(PROMPTS)
        x0 = sample(self.role, schedule, cond, Draw.for_images(0, np.arange(2)), self.role.row_shape)
        return (self.role.decode(x0) / 2 + 0.5).clamp(0, 1)

    def pipeline(self, name: str, schedule: Schedule) -> Any:
        """The pipeline with these parts, which knows the schedule's rules but not its levels."""
        parts = {
            **self.stock.components,
            "transformer": self.network,
            "scheduler": SCHEDULERS[schedule.kind](shift=3.0),
        }
        said = {key: getattr(schedule, key) for key in ("target", "last", "rescale")}
        made = CLASSES[name](**parts, **said, times=self.times, default_guidance_scale=schedule.guidance)
        made.set_progress_bar_config(disable=True)
        return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root = tmp_path_factory.mktemp("tiny")
    tiny = {"sd3": tiny_sd3, "sana": tiny_sana, "qwen": tiny_qwen_image}
    return {name: Trained(write(root / name)) for name, write in tiny.items()}


def drawn(pipeline: Any, steps: int | None, size: int) -> Tensor:
    """The pipeline's images on the noise of training."""
    with given_noise(pipeline, addresses(Draw.for_images(0, np.arange(2)))):
        pixels = images_of(pipeline, 2, None, steps, None, PROMPTS, (size, size))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


RULES = {
    "any": {"kind": "ode", "target": "next"},
    "any, the last step told a third": {"kind": "ode", "target": "next", "last": 1 / 3},
    "few": {"kind": "renoise", "target": "zero"},
    "multi": {"kind": "ode", "target": "same"},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_for_every_n_images_are_those_of_training(trained, name, rule):
    """`maths.solvers.sample`, told s by `Schedule.told`, for N = 1, 2, 4 out of one pipeline."""
    student, rules = trained[name], dict(RULES[rule])
    pipeline = student.pipeline(name, student.schedule(steps=1, **rules))
    made = [drawn(pipeline, steps, SIZE[name]) for steps in (1, 2, 4)]
    for steps, images in zip((1, 2, 4), made):
        close(images, student.images(student.schedule(steps=steps, **rules)))
    assert off(made[0], made[1]) > 1e-2 and off(made[1], made[2]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rescale", [None, "energy"])
def test_guidance_is_that_of_training(trained, name, rescale):
    """Twice the rows, all told the same s; "energy" keeps the norm of the conditional x0."""
    student = trained[name]
    schedule = student.schedule("ode", 2, target="next", guidance=3.0, rescale=rescale)
    made = drawn(student.pipeline(name, schedule), 2, SIZE[name])
    close(made, student.images(schedule))
    assert off(made, student.images(replace(schedule, guidance=1.0))) > 1e-3
    assert off(made, student.images(replace(schedule, rescale="energy" if rescale is None else None))) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_one_time_needs_no_times(trained, name):
    """Then the class is the stock one on the right levels."""
    student = trained[name]
    schedule = student.schedule("ode", 4, target="same")
    pipeline = student.pipeline(name, schedule)
    pipeline.register_modules(times=None)
    close(drawn(pipeline, 4, SIZE[name]), student.images(schedule))


@pytest.mark.parametrize("name", NAMES)
def test_a_start_below_noise_begins_without_signal(trained, name):
    """x = t_max n at t_max, as students without signal are trained."""
    student = trained[name]
    path = FlowPath(shift=3.0, t_max=FlowPath(shift=3.0).time(0.6), zero_signal=True)
    schedule = Schedule("ode", path.grid(2), target="next")
    pipeline = student.pipeline(name, schedule)
    pipeline.register_to_config(start=0.6)
    pure, student.role.path = student.role.path, path
    images = student.images(schedule)
    student.role.path = pure
    close(drawn(pipeline, 2, SIZE[name]), images)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_on_the_network_or_scheduler_after_a_call(trained, name):
    """Neither after a whole call nor after one that broke off."""
    student = trained[name]
    pipeline = student.pipeline(name, student.schedule("ode", 2, target="next", guidance=3.0, rescale="energy"))
    drawn(pipeline, 2, SIZE[name])
    pipeline.times = FewStepTimes(("s", "other"))
    with pytest.raises(ValueError, match="reads 'other'"):
        drawn(pipeline, 2, SIZE[name])
    parts = list(pipeline.transformer.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    assert "step" not in vars(pipeline.scheduler)


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides_the_noise_of_later_steps_too(trained, name):
    """The stock SD3 and Qwen-Image pipelines hand it to no scheduler."""
    student = trained[name]
    pipeline = student.pipeline(name, student.schedule("renoise", 2, target="zero"))
    images = [seeded(pipeline, name, seed) for seed in (0, 0, 1)]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def seeded(pipeline: Any, name: str, seed: int) -> Any:
    size = {"height": SIZE[name], "width": SIZE[name]} | ({"use_resolution_binning": False} if name == "sana" else {})
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.seed()  # what the global generator says must not matter
        return pipeline("cat", num_inference_steps=2, generator=generator, output_type="np", **size).images


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_brings_its_code_and_loads_with_the_installed_class(trained, name, tmp_path):
    """model_index.json names [file, class]; no file of the folder is run."""
    student = trained[name]
    schedule = student.schedule("ode", 2, target="next", last=0.5)
    pipeline = student.pipeline(name, schedule)
    pipeline.register_to_config(default_steps=2)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    file, cls = index["_class_name"]
    assert (tmp_path / f"{file}.py").is_file() and cls == CLASSES[name].__name__
    assert index["times"] == ["modeling_fewstep_times_v1", "FewStepTimes"]
    (tmp_path / f"{file}.py").write_text("raise SystemExit('run')")
    (tmp_path / "times" / "modeling_fewstep_times_v1.py").write_text("raise SystemExit('run')")
    loaded = CLASSES[name].from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.times) is FewStepTimes and loaded.config["last"] == 0.5
    close(drawn(loaded, None, SIZE[name]), student.images(schedule))


FRESH = """
import sys
sys.modules["fewstep"] = sys.modules["fewstep_pipelines"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
start = load_file(sys.argv[2])["start"]
images = [pipe(["a red cat", "2 dogs?"], latents=start, num_inference_steps=n, output_type="np").images for n in (1, 4)]
pipe.save_pretrained(sys.argv[1] + "/again")
save_file({"images": torch.from_numpy(images[0]), "more": torch.from_numpy(images[1])}, sys.argv[3])
"""


def test_a_process_without_fewstep_makes_the_images_of_training(trained, tmp_path):
    """And what it saves can be loaded again."""
    student = trained["sd3"]
    rules = {"target": "next", "guidance": 2.0}
    student.pipeline("sd3", student.schedule("ode", 1, **rules)).save_pretrained(tmp_path / "model")
    start = Draw.for_images(0, np.arange(2)).normal("rollout.start", 4, 8, 8)
    save_file({"start": start}, tmp_path / "noise.safetensors")
    arguments = [tmp_path / "model", tmp_path / "noise.safetensors", tmp_path / "images.safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = load_file(arguments[2])
    for steps, images in ((1, made["images"]), (4, made["more"])):
        close(images.permute(0, 3, 1, 2), student.images(student.schedule("ode", steps, **rules)))
    again = CLASSES["sd3"].from_pretrained(tmp_path / "model" / "again")
    close(drawn(again, 4, 16), student.images(student.schedule("ode", 4, **rules)))


@pytest.mark.parametrize("name", NAMES)
def test_the_file_imports_torch_diffusers_and_the_standard_library_only(name):
    tree = ast.parse(Path(inspect.getfile(CLASSES[name])).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", "diffusers"}
    assert all(n.level == 0 for n in imports if isinstance(n, ast.ImportFrom))


@pytest.mark.parametrize(
    "method", ["load_config", "save_config", "to_json_string", "prepare_latents", "_sigmas", "_two_times", "_same_norm"]
)
def test_files_that_must_stand_alone_say_the_same(method):
    """They cannot share code, so what they share is held equal here."""
    assert len({inspect.getsource(getattr(cls, method)) for cls in CLASSES.values()}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_words_that_are_no_rule_are_refused(trained, name):
    with pytest.raises(ValueError, match="write next, zero or same"):
        CLASSES[name](**trained[name].stock.components, target="nxt")


def off(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.std() > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
