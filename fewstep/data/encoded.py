"""Pictures and prompts as a latent network reads them: a source with the pipeline's frozen encoders behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..errors import UserError
from ..models.registry import FAMILIES
from .batch import Cond
from .source import Source, SourceConfig, digest

if TYPE_CHECKING:
    from ..draws import Draw
    from ..models.family import Surroundings
    from ..roles import Handle

MEND = "write {source: captions, path: FOLDER, size: N}"
REMEMBERED = 1024  # prompts whose embeddings are kept on the host: 0.24 GB for SD 1.5, 0.7 GB for SDXL


class CacheConfig(SourceConfig):
    """What a recipe may write of any source with prompts: `{..., cache: FOLDER}`."""

    cache: str | None = Field(default=None, description="folder in which latents and embeddings are kept, made once")
    cache_dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of what is kept")


def dressed(sources: Mapping[str, Source], handles: Mapping[str, Handle]) -> dict[str, Source]:
    """The sources as the networks read them: encoded, when some role is part of a latent pipeline.

    A source is encoded when its rows hold a prompt or pixels; labels, text and everything else stay as they are.
    """
    around = next((handle.around for handle in handles.values() if handle.around is not None), None)
    if around is None:
        return dict(sources)
    return {name: _encoded(source, around) if _readable(source) else source for name, source in sources.items()}


def fitting(sources: Mapping[str, Source]) -> Callable[[Handle], None]:
    """Tells a network that takes any size what a row of `train` is, as `roles.assemble` wants it told."""
    shapes: list[tuple[int, ...] | None] = []

    def fit(handle: Handle) -> None:
        family = FAMILIES.get(str(handle.family)) if handle.path is not None else None
        if family is None or "train" not in sources:
            return
        if not family.facts.latent.any_size:
            _check_size(sources["train"], handle, family)
            return
        if not shapes:
            shapes.append(dressed({"train": sources["train"]}, {handle.name: handle})["train"].row_shape)
        family.fit(handle.module, shapes[0])

    return fit


def _check_size(source: Source, handle: Handle, family: Any) -> None:
    """UserError for prompts that ask for another size than the network's config says."""
    size, around = getattr(source.config, "size", None), handle.around
    if size is None or around is None or "x0" in source.fetch(torch.zeros(1).long(), None):
        return
    own = family.row_shape(handle.module)
    if Encoded(source, around).row_shape != own:
        raise UserError(
            f"data.train.size={size}: this {family.name} network makes latents of {own[1:]} alone: leave size out"
        )


def _encoded(source: Source, around: Surroundings) -> Encoded:
    """Encoded at every fetch, or once where the source says `cache`."""
    if getattr(source.config, "cache", None) is None:
        return Encoded(source, around)
    from .latents import Cached

    return Cached(source, around)


def plain(source: Source) -> Source:
    """The source of pixels and prompts behind `dressed`; any other source itself."""
    return source.source if isinstance(source, Encoded) else source


class Encoded(Source):
    """Another source, its pixels as latents and its prompts as fields of `cond`.

        x0 = encode(pixels, draw.normal("vae", *latent))    a sample of the VAE's posterior; without a draw its mean
        cond = cond + prompts(prompt)                       `prompt` itself stays a field of the rows

    Nothing here has a gradient. Latents lie where the VAE does, embeddings on the host. An embedding is computed from one
    text alone, so that it depends neither on its neighbours in a batch nor on what was remembered before a resume.
    """

    def __init__(self, source: Source, around: Surroundings):
        super().__init__()
        self.source, self.around = source, around
        self.classes, self.buckets = source.classes, source.buckets
        self._name = f"the data source {type(source).__name__}"
        self._texts: OrderedDict[str, Cond] = OrderedDict()

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    @torch.no_grad()
    def row_shape(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Shape of one latent [channels, height, width]; None for prompts alone."""
        pixels = self.source.row_shape
        if pixels is None:
            return None
        if pixels[0] != 3:
            raise UserError(f"{self._name} has images of {pixels[0]} channel(s), but the VAE reads 3: {MEND}")
        return tuple(self.around.encode(torch.zeros(1, *pixels)).shape[1:])

    @torch.no_grad()
    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """The source's rows with `x0` as latents and `cond` with the prompts' embeddings."""
        rows = self.source.fetch(ids, draw)
        if "prompt" not in rows and not rows["cond"]:
            raise UserError(f"{self._name} has no captions, but the network reads prompts: {MEND}")
        if "prompt" in rows:
            rows["cond"] = rows["cond"].with_(**self._embed(rows["prompt"]))
        if "x0" in rows:
            noise = draw.normal("vae", *self.latent(rows["x0"].shape[1:])) if draw is not None else None
            rows["x0"] = self.around.encode(rows["x0"], noise)
        return rows

    def latent(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latent of pixels [3, height, width], which need not be of the source's usual size."""
        usual, shape = self.source.row_shape, self.row_shape
        assert usual is not None and shape is not None
        return (shape[0], *(side * small // large for side, small, large in zip(pixels[1:], shape[1:], usual[1:])))

    def content_key(self) -> str:
        """Digest of the source and of the encoders' weights."""
        return digest("encoded", self.source.content_key(), self.around.key())

    def _embed(self, texts: Sequence[str]) -> Cond:
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                self._texts[text] = self.around.prompts([text]).to("cpu")
            self._texts.move_to_end(text)
        rows = Cond.cat([self._texts[text] for text in texts])
        while len(self._texts) > REMEMBERED:
            self._texts.popitem(last=False)
        return rows


def _readable(source: Source) -> bool:
    return source.row_shape is not None or (len(source) > 0 and "prompt" in source.fetch(torch.zeros(1).long(), None))
