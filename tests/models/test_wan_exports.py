"""Students of Wan 2.1 in the stock pipeline: folders, adapters, training on videos, `fewstep sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor

from fewstep.cli.main import main
from fewstep.data.batch import Cond
from fewstep.data.registry import SOURCES
from fewstep.data.source import Source, SourceConfig, digest
from fewstep.draws import Draw
from fewstep.engine.exporting import check_export, export_run
from fewstep.engine.preview import save_grid
from fewstep.engine.trainer import Trainer
from fewstep.exporting.folder import export
from fewstep.exporting.fresh import given_noise, images_of
from fewstep.exporting.pipeline import addresses, generate, load_pipeline
from fewstep.exporting.reload import reload_check
from fewstep.exporting.targets import training_path
from fewstep.maths.paths import FlowPath
from fewstep.maths.solvers import Kind, Schedule, sample
from fewstep.models.denoiser import Denoiser
from fewstep.models.folder import card, open_model
from fewstep.recipe import load_recipe
from fewstep.roles import merged

from .flow_stock import PROMPTS, denoiser, student, with_module
from .tiny_wan import SHAPE, SIZE, tiny_wan

PIXELS = tuple(SIZE.values())  # frames, height, width


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline."""
    return tiny_wan(tmp_path_factory.mktemp("tiny") / "wan")


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A student's folder and its videos."""
    return exported(denoiser(folder), tmp_path_factory.mktemp("student") / "m")


def exported(
    role: Denoiser, out: Path, kind: Kind = "ode", steps: int = 2, guidance: float = 1.0
) -> tuple[Path, Tensor]:
    """The folder of a student, and its videos [2, 3, 9, 16, 32] in 0..1 by our own solver."""
    h = role.handle

    def on(path: Any) -> Schedule:
        return Schedule(kind, path.grid(steps), guidance=guidance)

    h.path = path = training_path(role.family, h.path, on, labels=False, latent=True)
    plain = with_module(role, merged(h) if h.adapter else h.module)
    with torch.no_grad():
        x0 = sample(plain, on(path), h.around.prompts(PROMPTS), Draw.for_images(0, range(2)), SHAPE)
        videos = (plain.decode(x0) / 2 + 0.5).clamp(0, 1)
    said: dict[str, Any] = {"card": {"method": "toy", "size": PIXELS}, "adapter": h.adapter, "around": h.around}
    return export(plain.handle.module, role.family, path, on(path), out, **said), videos


def drawn(pipeline: Any, steps: int = 2, guidance: float = 1.0) -> Tensor:
    """Two videos [2, 3, 9, 16, 32] in 0..1 from the noise of addresses."""
    with given_noise(pipeline, addresses(Draw.for_images(0, range(2)))):
        frames = images_of(pipeline, 2, None, steps, guidance, PROMPTS, PIXELS)
    return torch.from_numpy(frames).movedim(-1, 1)


@pytest.mark.parametrize(
    ("kind", "steps", "guidance", "scheduler"),
    [
        ("ode", 1, 1.0, "DPMSolverMultistepScheduler"),
        ("ode", 2, 5.0, "DPMSolverMultistepScheduler"),
        ("ode", 4, 1.0, "DPMSolverMultistepScheduler"),
        ("renoise", 1, 1.0, "FlowMatchLCMScheduler"),
        ("renoise", 2, 5.0, "FlowMatchLCMScheduler"),
    ],
)
def test_the_exported_stock_pipeline_makes_the_solvers_videos(folder, tmp_path, kind, steps, guidance, scheduler):
    """Told N alone; `open_model` reads back the path that it was trained on, whole labels and all."""
    out, videos = exported(denoiser(folder), tmp_path / "m", kind, steps, guidance)
    theirs = load_pipeline(out, device="cpu")
    assert (type(theirs).__name__, type(theirs.scheduler).__name__) == ("WanPipeline", scheduler)
    assert (drawn(theirs, steps, guidance) - videos).abs().max() < 1e-4 and videos.std() > 0.05
    last = FlowPath(shift=3.0).time(1 / steps)  # of the levels, t = 3 u / (1 + 2 u)
    assert theirs.scheduler.sigmas[steps - 1].item() == pytest.approx(last, abs=2e-3)
    assert open_model(out).path.integer_timesteps == (kind == "ode") and not card(out)["remote_code"]


def test_exported_student_makes_the_same_videos_merged_and_as_an_adapter(folder, tmp_path):
    """The folder in diffusers alone, and its LoRA file on the stock pipeline of the base."""
    role = student(folder, tune="lora", lora={"rank": 2, "targets": "wide"}, moved=0.1)
    out, videos = exported(role, tmp_path / "m")
    reloaded = WanPipeline.from_pretrained(out, use_safetensors=True)
    assert (drawn(reloaded) - videos).abs().max() < 1e-4
    adapted = WanPipeline.from_pretrained(folder)
    adapted.register_modules(scheduler=reloaded.scheduler)
    before = drawn(adapted)
    adapted.load_lora_weights(out)
    assert (drawn(adapted) - videos).abs().max() < 1e-4 and (before - videos).abs().max() > 1e-3
    adapted.unload_lora_weights()
    assert torch.equal(drawn(adapted), before)


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_videos(folder, tmp_path):
    """Only diffusers, without fewstep."""
    out, videos = exported(student(folder, moved=0.02), tmp_path / "m", "renoise")
    start, noise = (Draw.for_images(0, range(2)).normal(name, *SHAPE) for name in ("rollout.start", "rollout.0"))
    assert reload_check(out, 2 * videos - 1, start, renoise=[noise], prompts=PROMPTS) < 1e-4


def test_the_card_shows_how_a_video_is_made(folder, tmp_path):
    """Number of frames, size, guidance off, and `.frames`; for the adapter as well."""
    out, _ = exported(student(folder, tune="lora", lora={"rank": 2}), tmp_path / "m")
    said = "num_inference_steps=2, guidance_scale=1, num_frames=9, height=16, width=32).frames[0]"
    text = (out / "README.md").read_text()
    assert text.count("video = pipe(") == text.count(said) == 2 and ".images" not in text
    assert "pipeline_tag: text-to-video" in text


def test_sampling_a_folder_gives_videos_that_do_not_depend_on_the_batch(made):
    """[n, 3, frames, height, width] uint8, one at a time unless it is told; the pipeline's default guidance is off."""
    pipeline, videos = load_pipeline(made[0], device="cpu"), made[1]
    alone = generate(pipeline, 2, prompts=PROMPTS)
    assert alone.images.shape == (2, 3, *PIXELS) and alone.images.dtype == torch.uint8 and alone.nfe == 2
    assert (alone.images / 255 - videos).abs().max() <= 0.5 / 255 + 1e-4
    together = generate(pipeline, 2, prompts=PROMPTS, batch=2).images
    assert (together.int() - alone.images).abs().max() <= 1
    guided = generate(pipeline, 2, prompts=PROMPTS, guidance=5.0)
    assert guided.nfe == 4 and (guided.images - alone.images.float()).abs().max() > 2


# ---- pictures of videos


def test_a_png_has_a_row_of_frames_of_each_video_and_a_gif_plays_them(tmp_path):
    """Frame j of video i is white at place (i, j) alone; of more frames than eight a picture shows eight, with the ends."""
    videos = torch.full((2, 3, 5, 48, 48), -1.0)
    videos[1, :, 3] = 1.0
    picture = Image.open(save_grid(videos, tmp_path / "a.png"))
    assert picture.size == (5 * 50, 2 * 50)
    white = [picture.getpixel((50 * j + 20, 50 * i + 20)) == (255, 255, 255) for i in range(2) for j in range(5)]
    assert white == [i == 8 for i in range(10)]
    many = torch.linspace(-1, 1, 81).reshape(1, 1, 81, 1, 1).expand(1, 3, 81, 48, 48)
    row = Image.open(save_grid(many, tmp_path / "b.png"))
    assert row.size == (8 * 50, 50)
    assert [row.getpixel((50 * j + 20, 20))[0] for j in (0, 1, 7)] == [0, round(11 / 80 * 255), 255]
    with Image.open(save_grid(videos, tmp_path / "a.webp", columns=2)) as film:
        assert (film.size, film.n_frames) == ((100, 50), 3)  # black, white, black
    moving = torch.linspace(-1, 1, 5).reshape(1, 1, 5, 1, 1).expand(2, 3, 5, 48, 48)
    with Image.open(save_grid(moving, tmp_path / "a.gif", columns=2)) as film:
        assert (film.size, film.n_frames) == ((100, 50), 5)
        levels = []
        for j in range(5):
            film.seek(j)
            levels.append(film.convert("RGB").getpixel((20, 20))[0])
        assert levels == pytest.approx([0, 64, 128, 191, 255], abs=8) and film.info["duration"] in (60, 62, 63)


def test_the_command_line_writes_videos(made, tmp_path, capsys):
    """A film of both, or a row of frames each, and the file is named."""
    out, videos = made
    words = ["sample", str(out), "-n", "2", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--json", "--out"]
    for name, size in (("rows.png", (8 * 98, 2 * 50)), ("film.gif", (2 * 98, 50))):
        file = tmp_path / name
        assert main([*words, str(file)]) == 0
        assert json.loads(capsys.readouterr().out)["file"] == str(file)
        with Image.open(file) as picture:
            assert picture.size == size
    with Image.open(tmp_path / "rows.png") as rows:
        shown = torch.tensor(rows.getpixel((7 * 98 + 3 * 31 + 1, 50 + 3 * 15 + 1)))  # the last pixel of the last frame
    assert (shown / 255 - videos[1, :, -1, -1, -1]).abs().max() < 1 / 255


# ---- training


class Videos(Source):
    """Six moving bars with prompts, [3, 9, 16, 32]."""

    row_shape = (3, *PIXELS)

    class Config(SourceConfig):
        """Nothing to say."""

    def __len__(self) -> int:
        return 6

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """A bar of four columns that moves a column a frame, from column 3 i."""
        frame, column = torch.arange(9)[:, None], torch.arange(32)
        inside = [(column - frame - 3 * i) % 32 < 4 for i in ids.tolist()]
        x0 = 2 * torch.stack(inside).float() - 1
        x0 = x0[:, None, :, None].expand(-1, 3, -1, 16, -1).contiguous()
        return {"x0": x0, "cond": Cond(), "prompt": [f"a bar from {3 * i}" for i in ids.tolist()]}

    def content_key(self) -> str:
        """The bars are always the same."""
        return digest("bars")


RECIPE = """
method: {method}
teacher: {{from: {teacher}}}
{more}
data: {{train: {{source: videos}}}}
preview: {{every: 2, n: 2}}
train: {{steps: 2, batch: 2, micro_batch: 1, precision: fp32, save_every: null, check_export: false}}
"""


def trained(folder: Path, out: Path, method: str, more: str) -> Trainer:
    """Two steps of a method on the bars, from the tiny pipeline."""
    file = out / "recipe.yaml"
    file.write_text(RECIPE.format(method=method, teacher=folder, more=more))
    trainer = Trainer(load_recipe(file), out / "run", show=False)
    trainer.run()
    return trainer


METHODS = {
    "decoupled_dmd": """
student: {tune: lora, lora: {rank: 2}, optimizer: {lr: 1e-2}}
fake_score: {tune: lora, lora: {rank: 2}}
config: {steps: 2, sampler: ode, guidance_scale: 5.0}""",
    "pcm": "student: {tune: lora, lora: {rank: 2}, optimizer: {lr: 1e-2}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_on_videos_ends_in_a_stock_pipeline_that_makes_the_trainers_frames(
    folder, tmp_path, monkeypatch, method
):
    """Encoded as the network reads them, of the data's own length; in a fresh process that has only diffusers."""
    monkeypatch.setitem(SOURCES.table, "videos", f"{__name__}:Videos")
    trainer = trained(folder, tmp_path, method, METHODS[method])
    assert trainer.method.student.row_shape == SHAPE
    with Image.open(tmp_path / "run" / "previews" / "step-000002.png") as rows:
        assert rows.size == (8 * 98, 2 * 50)
    model = export_run(trainer)
    assert card(model)["size"] == [9, 16, 32] and card(model)["pipeline"] == "WanPipeline"
    assert check_export(trainer.method, model, rows=2, seed=5) < 1e-3
