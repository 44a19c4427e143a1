"""CLIP score: how well an image fits its prompt, by one of three back ends and in one of three conventions.

| convention  | of one image                                           | usual values |
|-------------|--------------------------------------------------------|--------------|
| `cosine`    | cos(image, prompt)                                     | 0.2 to 0.35  |
| `percent`   | 100 max(cos, 0)                                        | 20 to 35     |
| `clipscore` | 2.5 max(cos, 0) of "A photo depicts " + prompt         | 0.5 to 0.9   |

The last is that of Hessel et al. 2021 (arXiv 2104.08718). Values of two conventions, models or back ends are never
compared. Images go through Pillow: RGB, bicubic to the encoder's size on the short side, centre crop. Embeddings are
normalised in float32. Long prompts are cut at the encoder's length, never dropped.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import UserError, nearest
from ..models.build import parse
from ..rewards.clip import OPENAI, EncoderTowers
from ..rewards.cosine import ClipTowers, Towers, clip_model, cosine
from ..rewards.pixels import MEAN, STD
from ..rewards.tokens import tokenizer
from ..rewards.weights import Published
from ..store import content_key
from .evaluate import Instrument
from .image_metrics import ImageMetric, default_device

CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda c: c,
    "percent": lambda c: 100 * c.clamp(min=0),
    "clipscore": lambda c: 2.5 * c.clamp(min=0),
}
DEPICTS = "A photo depicts "
HUB = {
    **OPENAI,
    "ViT-H-14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g-14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
}
PACKAGE = {"transformers": "transformers", "open_clip": "open_clip_torch", "clip": "clip-anytorch"}
SETUPTOOLS = 'pip install "setuptools<81,!=70.0.0"'  # clip-anytorch imports pkg_resources.packaging


class ClipScoreSpec(BaseModel):
    """`clip_score: {model: ViT-g-14, backend: transformers, convention: cosine, prefix: "A photo depicts "}`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    model: str = Field(default="ViT-B/32", description="name, e.g. ViT-L/14, ViT-H-14, ViT-g-14")
    source: str | None = Field(
        default=None, alias="from", description="folder, file, or hub id in the local cache; default: that of the model"
    )
    backend: Literal["transformers", "open_clip", "clip"] = "transformers"
    convention: Literal["cosine", "percent", "clipscore"] = "cosine"
    prefix: str | None = Field(default=None, description='before each prompt; default "A photo depicts " for clipscore')

    @property
    def before(self) -> str:
        """The prefix in force."""
        return self.prefix if self.prefix is not None else (DEPICTS if self.convention == "clipscore" else "")


def clip_score(options: Mapping[str, Any]) -> ImageMetric:
    """The metric of those options. UserError for a package, weights or a tokenizer that are missing, or other weights."""
    spec = parse(ClipScoreSpec, options, "clip_score")
    towers = BACKENDS[spec.backend](spec).eval().requires_grad_(False).to(default_device())
    convention, before = CONVENTIONS[spec.convention], spec.before

    @torch.no_grad()
    def values(images: Tensor, prompts: Sequence[str] | None, _labels: Tensor | None) -> Tensor:
        if prompts is None:
            raise UserError("clip_score needs prompts, and there are none: give --prompts FILE")
        device = next(towers.parameters()).device
        seen = towers.image(pillow_pixels(images, towers.size).to(device))
        return convention(cosine(seen, towers.text([before + text for text in prompts])).cpu())

    return ImageMetric(f"clip_score.{spec.convention}", _instrument(spec, towers), values)


def pillow_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 images [n, 1 or 3, H, W] -> [n, 3, size, size], standardised, as CLIP's own preprocessing makes them.

    Pillow rounds to whole grey levels behind its bicubic resize of the short side; odd margins are cut as torchvision does.
    """
    from PIL import Image

    made = []
    for image in images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(np.ascontiguousarray(image))
        short = min(picture.size)
        width, height = (int(size * side / short) for side in picture.size)
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        made.append(np.asarray(picture.crop((left, top, left + size, top + size))))
    unit = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255
    return (unit - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _instrument(spec: ClipScoreSpec, towers: Towers) -> Instrument:
    package = PACKAGE[spec.backend]
    text = f", text '{spec.before}' + prompt" if spec.before else ""
    resize = f"bicubic to {towers.size} (Pillow), centre crop{text}"
    return Instrument(spec.model, package, version(package), content_key(dict(towers.state_dict())), resize)


def _hub(spec: ClipScoreSpec) -> Published:
    hub = HUB.get(spec.model)
    fetch = f"`hf download {hub or 'OWNER/NAME'}`"
    return Published("clip_score.from", hub, fetch)


def _transformers(spec: ClipScoreSpec) -> Towers:
    published = _hub(spec)
    if spec.source is None and spec.model not in HUB:
        raise UserError(f"clip_score: unknown model '{spec.model}': {nearest(spec.model, HUB)}, or give `from`")
    place = published.find(HUB.get(spec.source or "", spec.source))
    model = clip_model(place, published, {}, torch.float32)
    length = model.config.text_config.max_position_embeddings
    return ClipTowers(model, tokenizer("CLIPTokenizer", place, published.option, length))


def _open_clip(spec: ClipScoreSpec) -> Towers:
    """From a folder as the hub has it (open_clip_config.json, open_clip_model.safetensors), or a file and a model's name."""
    try:
        import open_clip
    except ImportError:
        raise UserError("clip_score: the back end open_clip needs a package: pip install open_clip_torch") from None
    published = _hub(spec)
    place = published.find(spec.source)
    assert place is not None
    said = place / "open_clip_config.json"
    sizes = _sizes(said) if said.is_file() else open_clip.get_model_config(spec.model)
    if sizes is None:
        raise UserError(
            f"clip_score: open_clip knows no model '{spec.model}', and '{place}' has no open_clip_config.json"
        )
    weights = place / "open_clip_model.safetensors"
    model = open_clip.CLIP(**sizes)
    _fill(model, published.read(weights if weights.is_file() else place), published.option)
    return EncoderTowers(model, open_clip.SimpleTokenizer(context_length=model.context_length))


def _sizes(file: Path) -> dict[str, Any] | None:
    import json

    try:
        sizes: dict[str, Any] = json.loads(file.read_text())["model_cfg"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"clip_score: '{file}' says no model_cfg: fetch it anew") from None
    return sizes


def _clip(spec: ClipScoreSpec) -> Towers:
    """From a safetensors file under OpenAI's names, or OpenAI's own archive, which is opened when its sha256 is known."""
    clip = _clip_anytorch()
    from clip.model import build_model

    file = _clip_file(spec, clip)
    if file.suffix == ".safetensors":
        state = Published("clip_score.from", None, "").read(file)
    else:
        state = dict(torch.jit.load(file, map_location="cpu").state_dict())
    try:
        model = build_model(state).float()
        model.load_state_dict(state)  # again, for the first time they were rounded to float16
    except (KeyError, RuntimeError) as error:
        raise UserError(f"clip_score.from: '{file}' holds no CLIP under OpenAI's names: {_short(error)}") from None
    length = model.context_length
    return EncoderTowers(model, lambda texts: clip.tokenize(list(texts), context_length=length, truncate=True))


def _clip_anytorch() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources, which announces its end
            import clip
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "clip"
        mend = "pip install clip-anytorch" if absent else f"{SETUPTOOLS}, since it imports pkg_resources.packaging"
        raise UserError(f"clip_score: the back end clip cannot be imported ({_short(error)}): {mend}") from None
    return clip


def _clip_file(spec: ClipScoreSpec, clip: Any) -> Path:
    """The weights; of a file that is no safetensors the sha256 must be one that OpenAI published."""
    known = {Path(url).name: url.split("/")[-2] for url in clip.clip._MODELS.values()}
    usual = Path.home() / ".cache/clip" / f"{spec.model.replace('/', '-').replace('@', '-')}.pt"
    file = Path(spec.source).expanduser() if spec.source else usual
    if not file.is_file():
        raise UserError(
            f"clip_score.from: no weights '{file}' of {spec.model}: put OpenAI's {usual.name} or a safetensors file there"
        )
    if file.suffix != ".safetensors" and hashlib.sha256(file.read_bytes()).hexdigest() not in known.values():
        raise UserError(
            f"clip_score.from: '{file}' is none of OpenAI's archives (its sha256 is unknown), and such files can run code: "
            "fetch it anew, or give safetensors"
        )
    return file


def _fill(model: nn.Module, state: Mapping[str, Tensor], option: str) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{option}: these are not the weights of this model: {_short(error)}") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


BACKENDS: dict[str, Callable[[ClipScoreSpec], Towers]] = {
    "transformers": _transformers,
    "open_clip": _open_clip,
    "clip": _clip,
}
