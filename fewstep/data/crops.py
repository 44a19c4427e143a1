"""Crops that can be replayed: a geometry per row, drawn once, stored, and applied again to give the same pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from .registry import make_source
from .source import Source, SourceConfig, digest

if TYPE_CHECKING:
    from ..draws import Draw


class CropsConfig(SourceConfig):
    """`{source: crops, of: {source: fashion_mnist}, per_image: 8}`."""

    of: dict[str, Any] = Field(description="the source of the images")
    per_image: int = Field(gt=0, description="crops of each image")


class Crops(Source):
    """Every image of another source `per_image` times, each time under an id of its own: id = image * per_image + k.

    A row is the whole image, without augmentation, and says in `image` [n] which one it is; `replay` cuts the crop. An
    image that several ids of a fetch ask for is fetched once.
    """

    Config = CropsConfig

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.images, self.per_image = make_source(self.config.of), self.config.per_image
        self.row_shape, self.classes = self.images.row_shape, self.images.classes

    def __len__(self) -> int:
        return len(self.images) * self.per_image

    def fetch(self, ids: Tensor, draw: Draw | None) -> dict[str, Any]:
        """The images' own fields, and `image`."""
        images, row = (ids // self.per_image).unique(return_inverse=True)
        fields = self.images.fetch(images, None)
        rows = {name: _take(value, row) for name, value in fields.items()}
        return {**rows, "image": images[row]}

    def content_key(self) -> str:
        """Digest of the images and the number of crops."""
        return digest(f"crops {self.per_image}", self.images.content_key())


def _take(rows: Any, index: Tensor) -> Any:
    return [rows[i] for i in index.tolist()] if isinstance(rows, list) else rows[index]


class CropSpec(BaseModel):
    """How random resized crops are drawn, e.g. `crop: {scale: [0.08, 1], mirror: 0.5}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    scale: tuple[float, float] = Field(default=(0.08, 1.0), description="share of the image that a crop covers")
    ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="width / height of the box, in pixels")
    mirror: float = Field(default=0.5, ge=0, le=1, description="probability that a crop is mirrored")


def random_crops(draw: Draw, size: tuple[int, int], spec: CropSpec) -> tuple[Tensor, Tensor]:
    """Random resized crops: (coords [rows, 4], flip [rows]) in the form that `replay` takes.

    The box covers a share of the image uniform in `spec.scale`, with log(width / height) uniform in log `spec.ratio`,
    is clipped to the image, and lies anywhere in it, on whole pixels. `size` is (height, width) of the images.
    """
    area = draw.uniform("crop.area", low=spec.scale[0], high=spec.scale[1])
    low, high = torch.tensor(spec.ratio).log().tolist()
    stretch = (draw.uniform("crop.ratio", low=low, high=high) / 2).exp()
    whole = torch.tensor(size, device=area.device)
    full = (whole[0] * whole[1] * area).sqrt()[:, None]
    extent = torch.minimum((full * torch.stack([1 / stretch, stretch], 1)).round().clamp(min=1), whole)
    corner = (draw.uniform("crop.corner", 2) * (whole - extent + 1)).ceil() - 1  # uniform on 0 .. whole - extent
    return torch.cat([corner / whole, extent / whole], 1), draw.choice("crop.mirror", spec.mirror)


def replay(images: Tensor, coords: Tensor, flip: Tensor) -> Tensor:
    """Cuts each row's crop, resizes it to the image's size (bilinear), then mirrors it where `flip` says so.

    images [rows, C, H, W]; coords [rows, 4] = (top, left, height, width) as shares of H and W, rounded to whole pixels;
    flip [rows] bool. A pure function: equal records give equal pixels. Pixels outside the box play no part.
    """
    size = torch.tensor(images.shape[-2:], device=images.device)
    start = (coords[:, :2] * size).round()
    extent = (coords[:, 2:] * size).round().clamp(min=1)
    y, x = (_positions(start[:, i], extent[:, i], int(n)) for i, n in enumerate(images.shape[-2:]))
    x = torch.where(flip[:, None], x.flip(-1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _positions(start: Tensor, extent: Tensor, n: int) -> Tensor:
    """Where n output pixels read along one side, [rows, n]; -1 and 1 are the image's outer edges."""
    share = (torch.arange(n, device=start.device) + 0.5) / n
    place = start[:, None] + (share * extent[:, None]).clamp(min=0.5)
    last = start + extent - 0.5  # centres of the box's outermost pixels: what lies beyond them belongs to others
    return torch.minimum(place, last[:, None]) * (2 / n) - 1
