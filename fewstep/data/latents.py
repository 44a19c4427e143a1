"""Latents and embeddings of a whole source: encoded once, read from disk ever after, without the encoders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import RunFailed, UserError
from .batch import Cond
from .encoded import CacheConfig, Encoded
from .pictures import Pictures
from .source import Source, digest

if TYPE_CHECKING:
    from ..draws import Draw
    from ..models.family import Surroundings

FORMAT = "1"
ROWS = 256  # samples of a shard
AT_ONCE = 8  # pictures encoded together
OPEN = 64  # shards mapped into memory at a time
MIRRORED, SQUARE = "mirrored ", "square "  # what a picture's latent is of, other than the picture in its own size


class Cached(Encoded):
    """The rows of `Encoded`, from safetensors shards in a folder that is named by what they were made from.

    A shard holds of each of its samples the posterior's mean and standard deviation (also of the mirrored picture where
    the source mirrors, and of the centre square where it has buckets), and each of its texts' embeddings once:

        x0 = mean + std draw.normal("vae", *latent)         as Encoded draws it; without a draw the mean

    Shards are made at the first fetch. A shard that is there is not made again, so that a run which was stopped goes on;
    processes of one run begin at different shards. Then the encoders are let go of.
    """

    def __init__(self, source: Source, around: Surroundings):
        super().__init__(source, around)
        self._config: CacheConfig = source.config
        self._pictures = source if isinstance(source, Pictures) else None
        self._shard = lru_cache(OPEN)(self._opened)
        self._filled = False

    @cached_property
    def row_shape(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """Shape of one latent [channels, height, width]; None for prompts alone."""
        if self._pictures is not None and self._file(0).is_file():
            return tuple(self._means([0], [self._square(0)])[0].shape)
        return super().row_shape

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """The source's rows with `x0` as latents, where the draw is, and `cond` with the embeddings, on the host."""
        self.fill()
        cond = Cond.cat([self._embedding(i) for i in ids.tolist()])
        if self._pictures is None:
            return {**self.source.fetch(ids, None), "cond": cond}
        return {"x0": self._latents(self._pictures, ids, draw), "cond": cond, "prompt": self._pictures.prompts_of(ids)}

    @cached_property
    def folder(self) -> Path:
        """Where the shards lie."""
        said = f"{FORMAT} {ROWS} {self._config.cache_dtype} {self._pictures is not None and self._pictures.config.flip}"
        return Path(str(self._config.cache)) / digest(self.content_key(), said)[:16]

    @property
    def shards(self) -> int:
        """How many files hold all samples."""
        return -(-len(self) // ROWS)

    def fill(self, advance: Callable[[], None] = lambda: None) -> None:
        """Makes the shards that are missing, then lets go of the encoders; once, and before the first row is read.

        advance: called after each shard.
        """
        if self._filled:
            return
        for shard in _shared_out(self.shards):
            file = self._file(shard)
            if not file.is_file():
                _write(file, *self._made(shard))
            advance()
        self._filled = True
        self._let_go()

    # ---- reading

    def _latents(self, source: Pictures, ids: Tensor, draw: Draw | None) -> Tensor:
        chosen = ids.tolist()
        if draw is None:
            return self._means(chosen, [self._square(i) for i in chosen])
        source.size_of(ids)
        mirrored = source.mirrored(draw)
        kinds = ["" if mirrored is None or not mirrored[row] else MIRRORED for row in range(len(chosen))]
        mean, std = self._means(chosen, kinds), self._means(chosen, kinds, "std")
        noise = draw.normal("vae", *mean.shape[1:])
        return mean.to(noise) + std.to(noise) * noise

    def _means(self, chosen: Sequence[int], kinds: Sequence[str], of: str = "mean") -> Tensor:
        found = [self._get(i, f"{kind}{of} {i}") for i, kind in zip(chosen, kinds)]
        return torch.stack(found).float()

    def _square(self, i: int) -> str:
        return SQUARE if self.buckets is not None and self.buckets[i] != 0 else ""

    def _embedding(self, i: int) -> Cond:
        text = int(self._get(i, "texts")[i % ROWS])
        fields = self._shard(i // ROWS).metadata()["fields"].split()
        return Cond(**{name: _wide(self._get(i, f"{name} {text}")) for name in fields})

    def _get(self, i: int, name: str) -> Tensor:
        return self._shard(i // ROWS).get_tensor(name)

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def _opened(self, shard: int) -> Any:
        file = self._file(shard)
        try:
            return safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the cache '{file}': {error}; remove the file, and it is made anew") from None

    # ---- making

    @torch.no_grad()
    def _made(self, shard: int) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors of a shard by name, and the fields of a condition."""
        ids = torch.arange(shard * ROWS, min((shard + 1) * ROWS, len(self)))
        latents = {} if self._pictures is None else dict(self._encoded(self._pictures, ids))
        said = self.source.fetch(ids, None)["prompt"] if self._pictures is None else self._pictures.prompts_of(ids)
        number = {text: i for i, text in enumerate(dict.fromkeys(said))}
        conds = [self.around.prompts([text]).to("cpu") for text in number]
        fields = list(conds[0])
        texts = {f"{name} {i}": self._narrow(cond[name]) for i, cond in enumerate(conds) for name in fields}
        return {**latents, **texts, "texts": torch.tensor([number[text] for text in said])}, fields

    def _encoded(self, source: Pictures, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and latents of these pictures."""
        buckets = torch.zeros_like(ids) if source.buckets is None else source.buckets[ids]
        for bucket in buckets.unique().tolist():
            for part in ids[buckets == bucket].split(AT_ONCE):
                pixels = source.pixels(part, source.sizes[bucket])
                yield from self._posteriors("", part, pixels)
                if source.config.flip:
                    yield from self._posteriors(MIRRORED, part, pixels.flip(-1))
                if bucket:
                    yield from self._posteriors(SQUARE, part, source.pixels(part, source.sizes[0]))

    def _posteriors(self, kind: str, ids: Tensor, pixels: Tensor) -> Iterator[tuple[str, Tensor]]:
        mean = self.around.encode(pixels)
        std = self.around.encode(pixels, torch.ones_like(mean)) - mean  # latents are affine in the posterior's noise
        for row, i in enumerate(ids.tolist()):
            yield f"{kind}mean {i}", self._narrow(mean[row])
            yield f"{kind}std {i}", self._narrow(std[row])

    def _narrow(self, value: Tensor) -> Tensor:
        """As it is stored. Sizes and pooled vectors cost little, and stay exact."""
        narrow = value.is_floating_point() and value.ndim > 2
        return value.to("cpu", getattr(torch, self._config.cache_dtype) if narrow else value.dtype, copy=True)

    def _let_go(self) -> None:
        """The encoders leave memory; what stands for "no prompt" is asked for before that."""
        self.around.null(self._embedding(0))
        self.around.release()


def _shared_out(shards: int) -> list[int]:
    """All shards, those of this process first; what others have not made by then it makes itself, from the end."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    return [*range(rank, shards, world), *(shard for shard in reversed(range(shards)) if shard % world != rank)]


def _write(file: Path, tensors: dict[str, Tensor], fields: Sequence[str]) -> None:
    """In one rename, since a file that is there counts as whole."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as out:
            out.write(
                save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"fields": " ".join(fields)})
            )
            out.flush()
            os.fsync(out.fileno())
        aside.replace(file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise RunFailed(f"cannot write the cache '{file}': {error.strerror}; shards made before are whole") from None


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
