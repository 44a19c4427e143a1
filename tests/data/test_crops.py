"""Crops that are replayed: geometry, pixels, ids, and how often an image is read."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fewstep.data.canvas import DigitsOnCanvas
from fewstep.data.crops import Crops, CropSpec, random_crops, replay
from fewstep.draws import Draw
from fewstep.errors import UserError

SIZE = (24, 16)


def drawn(rows: int, **spec) -> tuple[torch.Tensor, torch.Tensor]:
    return random_crops(Draw(0, 0, range(rows)), SIZE, CropSpec(**spec))


def test_replay_equals_cutting_resizing_and_mirroring():
    images, (coords, flip) = torch.randn(64, 3, *SIZE), drawn(64)
    assert 0 < flip.sum() < 64
    for image, record, mirrored, got in zip(images, coords, flip, replay(images, coords, flip)):
        top, left, height, width = (record * torch.tensor([*SIZE, *SIZE])).round().int().tolist()
        cut = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(cut, SIZE, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(got, expected.flip(-1) if mirrored else expected, rtol=0, atol=2e-5)


def test_the_same_record_gives_the_same_pixels_whatever_lies_beside_it():
    images, (coords, flip) = torch.randn(9, 1, *SIZE), drawn(9)
    whole = replay(images, coords, flip)
    assert torch.equal(replay(images, coords, flip), whole)
    assert torch.equal(replay(images[4:6], coords[4:6], flip[4:6]), whole[4:6])


def test_the_whole_image_is_a_crop():
    images, whole = torch.randn(2, 1, *SIZE), torch.tensor([[0.0, 0, 1, 1]] * 2)
    torch.testing.assert_close(replay(images, whole, torch.tensor([False, True]))[0], images[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(
        replay(images, whole, torch.tensor([False, True]))[1], images[1].flip(-1), rtol=0, atol=2e-5
    )


def test_crops_lie_on_whole_pixels_inside_the_image():
    coords, _ = drawn(5000)
    pixels = coords * torch.tensor([*SIZE, *SIZE])
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-4)
    assert coords.min() >= 0 and (coords[:, :2] + coords[:, 2:]).max() <= 1 + 1e-6
    assert pixels[:, 2:].round().min() >= 1


def test_crops_cover_the_shares_asked_for_and_reach_every_corner():
    coords, flip = drawn(5000, scale=(0.3, 0.6), mirror=0.25)
    area = coords[:, 2] * coords[:, 3]
    assert area.quantile(0.02) > 0.25 and area.quantile(0.98) < 0.65
    assert abs(area.mean() - 0.45) < 0.02
    assert coords[:, :2].min() == 0 and (coords[:, :2] + coords[:, 2:]).amax(0).min() > 1 - 1e-6
    assert abs(flip.float().mean() - 0.25) < 0.03


class Counting(DigitsOnCanvas):
    """Counts the images that are read."""

    read = 0

    def fetch(self, ids, draw):
        self.read += len(ids)
        return super().fetch(ids, draw)


def test_an_image_is_read_once_for_all_its_crops():
    """Four crops of each image: a batch of 64 reads 16 images."""
    crops = Crops(of={"source": "digits_on_canvas"}, per_image=8)
    crops.images = Counting()
    images = torch.randperm(1000)[:16]
    ids = (images[:, None] * 8 + torch.tensor([7, 0, 3, 3])).flatten()
    rows = crops.fetch(ids, None)
    assert crops.images.read == 16
    plain = DigitsOnCanvas().fetch(images.repeat_interleave(4), None)
    assert torch.equal(rows["x0"], plain["x0"]) and torch.equal(rows["cond"]["label"], plain["cond"]["label"])
    assert torch.equal(rows["image"], images.repeat_interleave(4))


def test_crops_take_after_their_images():
    crops = Crops(of={"source": "digits_on_canvas", "split": "test"}, per_image=3)
    assert (len(crops), crops.classes, crops.row_shape) == (3 * 797, 10, (1, 20, 20))
    keys = {Crops(of={"source": s}, per_image=n).content_key() for s in ("digits", "digits_on_canvas") for n in (2, 3)}
    assert len(keys) == 4


def test_an_unknown_source_of_images_is_named():
    with pytest.raises(UserError, match="unknown data source 'digit'"):
        Crops(of={"source": "digit"}, per_image=2)
