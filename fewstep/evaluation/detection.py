"""What GenEval looks with: Mask2Former for objects, CLIP for colours, both from local folders; or mmdet's own results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError, nearest
from ..models.hub import local
from ..models.quiet import quiet
from ..rewards.cosine import VIT_L_14, ClipTowers, Towers, clip_model
from ..rewards.pixels import MEAN, STD
from ..rewards.tokens import tokenizer
from ..rewards.weights import Published, config_in
from .geneval import Instances
from .geneval_files import CLASSES, COLORS

if TYPE_CHECKING:
    from PIL.Image import Image

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = Published(
    "--clip",
    "openai/clip-vit-large-patch14",
    "`hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json`",
)
SHORT, LONG, DIVISOR = 800, 1333, 32  # of the image as Mask2Former sees it, in pixels
MOST = 100  # pairs of a query and a class that are looked at
GREY = 153  # what stands for the pixels around an object: #999
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# other names of COCO's classes, in its own list and in lists made after Pascal VOC
_ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, in grey levels
_CROPS = 16  # in one pass of CLIP


class Mask2Former:
    """A detector: a Mask2Former for COCO instances from a folder that transformers saved.

    The image goes in as mmdet prepares it: short side 800, but long side at most 1333 (bilinear), padded to 32. Masks are
    brought to the image's own size before they are cut at 0; score = class probability times the mean probability inside
    the mask. transformers' own post-processing cuts masks at 384 x 384 instead, and so moves boxes by some pixels.
    """

    def __init__(self, folder: str | Path, device: str = "cpu", short: int = SHORT, long: int = LONG):
        self.device, self.short, self.long = _device(device), short, long
        self.model = _mask2former(str(folder)).to(self.device)
        self.columns = class_columns(self.model.config.id2label, folder)

    @torch.no_grad()
    def __call__(self, image: Image, least: float) -> dict[str, Instances]:
        """The objects with a score above `least`, by GenEval's class names; classes without any are left out."""
        pixels, seen = prepared(image, self.short, self.long)
        out = self.model(pixel_values=pixels.to(self.device))
        chances = out.class_queries_logits[0].softmax(-1)[:, :-1]
        best = chances.flatten().topk(min(MOST, chances.numel()))
        # a mask only lowers a score, so what is not above `least` without it need not be drawn
        pairs = best.indices[best.values > least].cpu()
        queries, columns = pairs // chances.shape[1], pairs % chances.shape[1]
        found = []
        for query, column in zip(queries, columns):
            logits = F.interpolate(out.masks_queries_logits[:, query, None], pixels.shape[-2:], mode="bilinear")
            logits = F.interpolate(logits[..., : seen[0], : seen[1]], (image.height, image.width), mode="bilinear")
            found.append(_object(logits[0, 0], float(chances[query, column])))
        return gathered([self.columns.get(int(column)) for column in columns], found, least)


def _object(logits: Tensor, chance: float) -> tuple[np.ndarray, np.ndarray]:
    """(box with score, mask) of a mask's logits [height, width]."""
    inside = logits > 0
    sure = (logits.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
    mask = inside.cpu().numpy()
    return np.asarray([*box_of(mask), chance * float(sure)], np.float32), mask


class ClipColors:
    """A judge of colours: the nearest of the ten colour names, by CLIP, to each object cut out of its surroundings.

    The text of a colour is the mean of three templates' unit vectors. An object is cropped to its box, with grey (#999)
    outside its mask, and prepared as OpenAI's CLIP does it.
    """

    def __init__(self, towers: Towers):
        self.towers = towers.eval().requires_grad_(False)
        self._texts: dict[str, Tensor] = {}

    @classmethod
    def at(cls, folder: str | Path, device: str = "cpu") -> ClipColors:
        """With the CLIP of a folder that transformers saved. UserError for a folder that holds none."""
        place = CLIP.find(str(folder))
        model = clip_model(place, CLIP, VIT_L_14, torch.float32)
        length = model.config.text_config.max_position_embeddings
        return cls(ClipTowers(model, tokenizer("CLIPTokenizer", place, CLIP.option, length)).to(_device(device)))

    @torch.no_grad()
    def __call__(self, image: Image, objects: Instances, name: str) -> list[str]:
        """A colour for each object of the class `name`."""
        texts = self.texts(name)
        pixels = torch.stack([clip_pixels(crop, self.towers.size) for crop in crops(image, objects)])
        seen = [F.normalize(self.towers.image(part.to(texts.device)).float(), dim=-1) for part in pixels.split(_CROPS)]
        return [COLORS[i] for i in (torch.cat(seen) @ texts.T).argmax(1).tolist()]

    @torch.no_grad()
    def texts(self, name: str) -> Tensor:
        """Unit vectors of the ten colours of a class, [10, d]."""
        if name not in self._texts:
            said = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            each = F.normalize(self.towers.text(said).float(), dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._texts[name] = F.normalize(each.mean(1), dim=-1)
        return self._texts[name]


def from_mmdet(result: Any, least: float = 0.0) -> dict[str, Instances]:
    """Detections of what mmdet answers for one image: `inference_detector` of 2.x, or a `DetDataSample` of 3.x.

    So the official detector serves where mmdet is installed: `lambda image, least: from_mmdet(inference_detector(model,
    numpy.asarray(image)[..., ::-1]), least)`. Its classes must be COCO's, in COCO's order.
    """
    if hasattr(result, "pred_instances"):
        found = result.pred_instances.cpu()
        boxes = np.concatenate([found.bboxes.numpy(), found.scores.numpy()[:, None]], 1)
        masks = found.masks.numpy() if "masks" in found else [None] * len(boxes)
        labels = found.labels.tolist()
    else:
        per_class, per_mask = result if isinstance(result, tuple) else (result, None)
        boxes = np.concatenate([np.asarray(rows).reshape(-1, 5) for rows in per_class])
        labels = [label for label, rows in enumerate(per_class) for _ in range(len(rows))]
        masks = [None] * len(boxes) if per_mask is None else [mask for rows in per_mask for mask in rows]
    return gathered([CLASSES[label] for label in labels], list(zip(boxes.astype(np.float32), masks)), least)


def gathered(
    names: Sequence[str | None], found: Sequence[tuple[np.ndarray, np.ndarray | None]], least: float
) -> dict[str, Instances]:
    """Instances by class of (box with score, mask) pairs; None is no class of GenEval's."""
    groups: dict[str, list[tuple[np.ndarray, Any]]] = {}
    for name, (box, mask) in zip(names, found):
        if name is not None and box[4] > np.float32(least):
            groups.setdefault(name, []).append((box, mask))
    return {name: _stacked(pairs) for name, pairs in groups.items()}


def _stacked(pairs: Sequence[tuple[np.ndarray, Any]]) -> Instances:
    boxes, masks = zip(*pairs)
    return Instances(np.stack(boxes), None if masks[0] is None else np.stack(masks).astype(bool))


def class_columns(labels: Mapping[int, str], folder: str | Path) -> dict[int, str]:
    """Column of the class scores -> GenEval's name. UserError when one of the 80 classes has no column."""
    known = {_ALIASES.get(name, name): int(column) for column, name in labels.items()}
    lacking = [name for name in CLASSES if name not in known]
    if lacking:
        hint = (
            nearest(lacking[0], known)
            if len(lacking) < len(CLASSES)
            else f"its classes are {next(iter(known), 'none')} ..."
        )
        raise UserError(
            f"--detector: '{folder}' knows {80 - len(lacking)} of COCO's 80 classes, not '{lacking[0]}' ({hint}): give "
            f"{DETECTOR}, or write COCO's names into id2label of its config.json"
        )
    return {known[name]: name for name in CLASSES}


def prepared(image: Image, short: int = SHORT, long: int = LONG) -> tuple[Tensor, tuple[int, int]]:
    """(pixels [1, 3, H, W] standardised and padded with 0 to multiples of 32, the (height, width) that is image)."""
    scale = min(short / min(image.size), long / max(image.size))
    height, width = (int(side * scale + 0.5) for side in (image.height, image.width))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    if (height, width) != (image.height, image.width):
        pixels = F.interpolate(pixels, (height, width), mode="bilinear").round()  # not antialiased, as OpenCV's
    pixels = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    return F.pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR)), (height, width)


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around the pixels of a mask [height, width]; right and bottom lie outside. Zeros for none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def crops(image: Image, objects: Instances) -> list[Image]:
    """Each object cut to its box, with grey outside its mask."""
    from PIL import Image as images

    pixels, cut = np.asarray(image), []
    for i, box in enumerate(objects.boxes):
        shown = pixels if objects.masks is None else np.where(objects.masks[i][..., None], pixels, np.uint8(GREY))
        left, top, right, bottom = (round(float(side)) for side in box[:4])
        cut.append(images.fromarray(shown).crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    return cut


def clip_pixels(image: Image, size: int) -> Tensor:
    """[3, size, size] as OpenAI's CLIP prepares a picture: short side to `size` (bicubic, in grey levels), middle cut out."""
    from PIL import Image as images

    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    middle = image.resize((width, height), images.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(middle)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _mask2former(source: str) -> Any:
    for package in ("transformers", "scipy"):  # the latter for its loss, which is built with the model
        if find_spec(package) is None:
            raise UserError(f"--detector needs {package}: pip install {package}")
    import transformers

    kind: Any = transformers.Mask2FormerForUniversalSegmentation
    place = local(source)
    if place is None:
        raise UserError(
            f"--detector: no Mask2Former in '{source}': fetch one (`hf download {DETECTOR}`) and name its folder"
        )
    config_in(place, "mask2former", "--detector")
    if not any(place.glob("*.safetensors")):
        raise UserError(
            f"--detector: no safetensors in '{place}': pickles are never loaded; save the model anew by transformers"
        )
    try:
        with quiet():
            model, loading = kind.from_pretrained(
                place, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--detector: '{place}' holds no Mask2Former ({str(error).splitlines()[0][:120]}): name another"
        ) from None
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise UserError(f"--detector: the weights in '{place}' are not a whole Mask2Former: fetch {DETECTOR} anew")
    return model.eval().requires_grad_(False)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}: use cpu") from None
    return device
