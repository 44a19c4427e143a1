"""Digits on canvases of noise."""

from __future__ import annotations

import torch

from fewstep.data.canvas import DigitsOnCanvas
from fewstep.data.images import Digits


def test_the_splits_share_no_digit_and_hold_all_classes_alike():
    train, test = DigitsOnCanvas(), DigitsOnCanvas(split="test")
    assert (len(train), len(test)) == (1000, 797)
    together = Digits().labels.bincount().float()
    assert (train.labels.bincount() / together - 1000 / 1797).abs().max() < 0.01
    assert torch.equal((train.labels.bincount() + test.labels.bincount()).float(), together)


def test_each_canvas_shows_its_digit_somewhere():
    """Without noise exactly the digit's pixels are left, at a place that differs from canvas to canvas."""
    train = DigitsOnCanvas(noise=0)
    ink = {tuple(sorted(d[d > 0].tolist())): int(y) for d, y in zip(Digits().pixels.flatten(1), Digits().labels)}
    places = set()
    for canvas, label in zip(train.pixels[:200, 0], train.labels):
        grey = (canvas[canvas > 0].float() * 16 / 255).round().int()
        assert ink[tuple(sorted(grey.tolist()))] == label
        rows, columns = canvas.nonzero().aminmax(dim=0)[0].tolist()
        places.add((rows, columns))
    assert len(places) > 80


def test_noise_stays_below_its_limit_and_the_seed_decides():
    canvas = DigitsOnCanvas(noise=0.2).pixels
    border = torch.cat([canvas[..., 0], canvas[..., -1]]).float()
    assert (border > 0.2 * 255 + 0.5).float().mean() < 0.05, "ink reaches the border seldom, noise never exceeds it"
    assert torch.equal(canvas, DigitsOnCanvas(noise=0.2).pixels)
    assert not torch.equal(canvas, DigitsOnCanvas(noise=0.2, seed=1).pixels)
