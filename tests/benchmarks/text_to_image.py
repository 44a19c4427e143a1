"""Text to image from nothing on one CPU: pictures with captions, an autoencoder, a teacher, and its student in four steps.

    python -m tests.benchmarks.text_to_image OUT [--teacher-steps 1500] [--student-steps 400]

Real handwritten digits (1,797 pictures, 8x8, enlarged to 16x16 in RGB) with captions such as "a seven". A Stable Diffusion
pipeline of tiny networks is made: the autoencoder is trained here, the text encoder stays random and frozen, the UNet
is trained by `flow_matching` and distilled by `decoupled_dmd` from prompts alone. Prints a Markdown row a model: how often the
shipped digit classifier reads the digit that was asked for, and the FID of its features.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, mse_loss
from transformers import CLIPTextConfig, CLIPTextModel

import fewstep
from fewstep.data.images import to_uint8
from fewstep.data.registry import make_source
from fewstep.evaluation.features import feature_network
from fewstep.evaluation.fid import Moments, frechet_distance
from fewstep.exporting.pipeline import generate
from tests.data.tiny_captions import NAMES
from tests.models.tiny_sd import LENGTH, _tokenizer

SIZE, SIDE, CHANNELS, WORDS = 16, 8, 4, 64  # pixels, latents, their channels, width of text states
TEMPLATES = ("{}", "a {}", "one {}", "the {}")
DRAWN = 500


def main(
    out: Path,
    teacher_steps: Annotated[int, typer.Option(help="Of the teacher.")] = 1500,
    student_steps: Annotated[int, typer.Option(help="Of the student.")] = 400,
) -> None:
    """Makes everything in OUT and prints the table."""
    pixels, labels = digits()
    captions, prompts = write_captions(out / "captions", pixels, labels), write_prompts(out / "prompts.txt")
    base = write_pipeline(out / "base", pixels)
    seconds = {}
    seconds["teacher"], teacher = timed(teacher_recipe(base, captions, teacher_steps), out / "teacher")
    seconds["student"], student = timed(student_recipe(teacher, prompts, student_steps), out / "student")
    print("| model | steps | guidance | asked digit read | FID[digits-cnn] | ms an image | trained in s |")
    print("|" + " --- |" * 7)
    row("real digits", None, None, (pixels + 1) / 2, labels, pixels, None, None)
    for folder, steps, scale in ((teacher, 50, 3.0), (teacher, 50, 1.0), (teacher, 4, 3.0), (student, 4, 1.0)):
        asked = torch.arange(DRAWN) % 10
        words = [TEMPLATES[i // 10 % len(TEMPLATES)].format(NAMES[i % 10]) for i in range(DRAWN)]
        made = generate(folder, DRAWN, steps=steps, guidance=scale, prompts=words, batch=100)
        images = made.images.float() / 255
        row(folder.parent.name, steps, scale, images, asked, pixels, made.ms_per_image, seconds[folder.parent.name])


def digits() -> tuple[Tensor, Tensor]:
    """[1797, 3, 16, 16] in [-1, 1], and labels."""
    rows = make_source({"source": "digits"}).fetch(torch.arange(1797), None)
    large = [
        Image.fromarray(picture.numpy()).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for picture in to_uint8(rows["x0"])[:, 0]
    ]
    flat = torch.stack([torch.tensor(list(picture.getdata())).reshape(SIZE, SIZE) for picture in large])
    return (flat / 127.5 - 1)[:, None].expand(-1, 3, -1, -1).contiguous(), rows["cond"]["label"]


def write_captions(folder: Path, pixels: Tensor, labels: Tensor) -> Path:
    """PNG files with metadata.jsonl; the words around a digit's name are taken in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, label) in enumerate(zip(to_uint8(pixels), labels.tolist())):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
        text = TEMPLATES[i % len(TEMPLATES)].format(NAMES[label])
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_prompts(file: Path) -> Path:
    """Every digit in every wording, one a line."""
    file.write_text("".join(f"{template.format(name)}\n" for template in TEMPLATES for name in NAMES))
    return file


def write_pipeline(folder: Path, pixels: Tensor) -> Path:
    """A pipeline whose autoencoder is trained on `pixels`; the rest is random."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(pixels),
        text_encoder=text_encoder(),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(48, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WORDS,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def autoencoder(pixels: Tensor, steps: int = 600) -> Any:
    """Latents [4, 8, 8] of unit size; mean squared error and a little KL."""
    vae: Any = AutoencoderKL(
        latent_channels=CHANNELS,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        x = pixels[torch.randint(len(pixels), (64,))]
        posterior = vae.encode(x).latent_dist
        loss = mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        latents = vae.eval().encode(pixels[:512]).latent_dist.mean
        error = mse_loss(vae.decode(latents).sample, pixels[:512]).item()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    print(f"autoencoder: mean squared error {error:.4f} of pixels in [-1, 1]")
    return vae


def text_encoder() -> Any:
    """Random and frozen: other letters, other states."""
    size = len(_tokenizer())
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=WORDS,
        intermediate_size=2 * WORDS,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
    )
    encoder = CLIPTextModel(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / parameter.shape[-1] ** 0.5)
    return encoder


def teacher_recipe(base: Path, captions: Path, steps: int) -> dict[str, Any]:
    """Plain training on pictures, a tenth of them without their caption."""
    return {
        "method": "flow_matching",
        "student": {
            "from": str(base),
            "optimizer": {"lr": 1.5e-3, "warmup": 50, "decay": "cosine"},
            "ema": 0.995,
        },
        "config": {"label_dropout": 0.1, "steps": 50, "guidance_scale": 3.0},
        "data": {"train": {"source": "captions", "path": str(captions), "size": SIZE, "cache": f"{captions}-latents"}},
        "train": {"steps": steps, "batch": 64},
    }


def student_recipe(teacher: Path, prompts: Path, steps: int) -> dict[str, Any]:
    """Four steps from prompts alone; guidance is baked in."""
    optimizer = {"lr": 3e-4, "betas": [0.9, 0.99], "weight_decay": 0.0, "warmup": 30, "decay": "cosine"}
    return {
        "method": "decoupled_dmd",
        "teacher": {"from": str(teacher)},
        "student": {"tune": "full", "optimizer": optimizer, "ema": 0.98},
        "fake_score": {"tune": "full", "optimizer": optimizer},
        "config": {"steps": 4, "sampler": "renoise", "guidance_scale": 3.0, "fake_updates": 3},
        "data": {"train": {"source": "prompts", "path": str(prompts)}},
        "train": {"steps": steps, "batch": 64},
    }


def timed(recipe: dict[str, Any], out: Path) -> tuple[float, Path]:
    """Seconds of training, and the model's folder."""
    began = time.perf_counter()
    run = fewstep.train(recipe, out, resume=out.exists())
    assert run.model is not None
    return time.perf_counter() - began, run.model


def row(
    name: str,
    steps: int | None,
    scale: float | None,
    images: Tensor,
    asked: Tensor,
    pixels: Tensor,
    ms: float | None,
    seconds: float | None,
) -> None:
    """Images [n, 3, 16, 16] in 0..1 are read as grey 8x8 ones, real ones as well."""
    network = feature_network("digits-cnn")
    made, real = (grey(x) for x in (images, (pixels + 1) / 2))
    logits: Any = network.logits(made)
    read = (logits.argmax(1) == asked).double().mean().item()
    distance = frechet_distance(Moments.of(network.features(made)), Moments.of(network.features(real)))
    numbers = [steps, scale, f"{read:.3f}", f"{distance:.4f}", ms and f"{ms:.0f}", seconds and f"{seconds:.0f}"]
    print(f"| {name} | " + " | ".join("" if value is None else str(value) for value in numbers) + " |", flush=True)


def grey(images: Tensor) -> Tensor:
    """uint8 [n, 1, 8, 8]"""
    return (255 * avg_pool2d(images.mean(1, keepdim=True), 2)).round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    typer.run(main)
