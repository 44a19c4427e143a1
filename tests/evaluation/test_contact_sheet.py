"""Thumbnails with their numbers and prompts."""

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluation.contact_sheet import CELL, contact_sheet


def _pictures(folder, n):
    files = [folder / f"{i}.png" for i in range(n)]
    for i, file in enumerate(files):
        Image.new("RGB", (8, 6), (i, 200, 100)).save(file)
    return files


@pytest.mark.parametrize(("n", "most", "shown"), [(5, 24, 5), (30, 10, 10), (7, 3, 3)])
def test_pictures_are_shown_at_equal_distances(tmp_path, n, most, shown):
    page = Image.open(contact_sheet(_pictures(tmp_path, n), None, tmp_path / "page.png", most, columns=4))
    middles = [(i % 4 * CELL + CELL // 2, i // 4 * (CELL + 28) + CELL // 3) for i in range(shown)]
    assert [page.getpixel(at)[0] for at in middles] == [i * n // shown for i in range(shown)]


def test_prompts_of_any_script_stand_under_their_picture(tmp_path):
    files = _pictures(tmp_path, 2)
    told = [
        np.asarray(Image.open(contact_sheet(files, texts, tmp_path / "p.png")))
        for texts in (None, ["ein Würfel", "猫"])
    ]
    assert told[0].shape == told[1].shape
    assert (told[1][CELL:, :CELL] != told[0][CELL:, :CELL]).any()
    assert (told[1][: CELL - 2] == told[0][: CELL - 2]).all()
