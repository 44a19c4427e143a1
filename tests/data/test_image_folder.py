"""A folder of pictures: labels, crop, flip by address, and pictures that cannot be decoded."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.errors import UserError


def _picture(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file)


@pytest.fixture
def folder(tmp_path):
    ramp = np.tile(np.arange(8) * 30, (8, 1))
    for i in range(6):
        _picture(tmp_path / f"{i}.png", ramp + i)
    return tmp_path


def _source(folder, **more):
    return make_source({"source": "image_folder", "path": str(folder), "size": 8, "channels": 1, **more})


def test_pictures_are_served_by_name_and_normalised(folder):
    source = _source(folder)
    x0 = source.fetch(torch.tensor([3]), None)["x0"]
    assert (len(source), source.row_shape, source.classes) == (6, (1, 8, 8), None)
    assert torch.allclose(x0[0, 0, 0], (torch.arange(8) * 30 + 3) / 127.5 - 1)


def test_class_folders_become_labels_in_the_order_of_their_names(tmp_path):
    for name in ("zebra", "ant"):
        _picture(tmp_path / name / "a.png", np.zeros((4, 4)))
    (tmp_path / "notes").mkdir()
    source = _source(tmp_path)
    assert source.classes == 2
    assert [file.parent.name for file in source.files] == ["ant", "zebra"]
    assert source.fetch(torch.arange(2), None)["cond"]["label"].tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_the_centre_square_is_kept(tmp_path, shape):
    picture = np.zeros((*shape, 3))
    picture[shape[0] // 2 - 4 : shape[0] // 2 + 4, shape[1] // 2 - 4 : shape[1] // 2 + 4] = (255, 0, 255)
    _picture(tmp_path / "a.png", picture)
    x0 = _source(tmp_path, channels=3).fetch(torch.tensor([0]), None)["x0"]
    assert torch.equal(x0, torch.tensor([1.0, -1.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8))


def test_flips_depend_on_the_address_of_a_row_and_on_nothing_else(folder):
    source = _source(folder, flip=True)
    ids = torch.arange(6).repeat(20)
    plain = source.fetch(ids, None)["x0"]
    whole = source.fetch(ids, Draw(0, 7, np.arange(120)))["x0"]
    torch.manual_seed(1)
    part = source.fetch(ids[50:90], Draw(0, 7, np.arange(50, 90)))["x0"]
    flipped = (whole == plain.flip(-1)).all((1, 2, 3))
    assert torch.equal(whole[50:90], part)
    assert ((whole == plain).all((1, 2, 3)) | flipped).all()
    assert 40 < flipped.sum() < 80


def test_without_a_draw_nothing_is_flipped(folder):
    ids = torch.arange(6)
    assert torch.equal(_source(folder, flip=True).fetch(ids, None)["x0"], _source(folder).fetch(ids, None)["x0"])


def _damage(folder):
    whole = (folder / "0.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_bytes(b"this is no picture")
    (folder / "void.webp").write_bytes(b"")


def test_a_picture_that_cannot_be_decoded_is_named(folder):
    _damage(folder)
    with pytest.raises(UserError, match=r"cannot decode '.*broken\.png'.*skip_corrupt"):
        _source(folder)


def test_skipped_pictures_are_counted_and_reported(folder):
    _damage(folder)
    with pytest.warns(UserWarning, match=r"left out 3 of 9 images.*broken\.png"):
        source = _source(folder, skip_corrupt=True)
    assert (len(source), len(source.skipped)) == (6, 3)


def test_a_folder_of_nothing_but_broken_pictures_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 1 images"):
        _source(tmp_path, skip_corrupt=True)


def test_every_damage_to_a_png_is_found_or_harmless(folder):
    whole = (folder / "1.png").read_bytes()
    expected = _source(folder).fetch(torch.tensor([1]), None)["x0"]
    rng = np.random.default_rng(0)
    for _ in range(200):
        raw = bytearray(whole)
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        (folder / "1.png").write_bytes(bytes(raw))
        try:
            served = _source(folder)
        except UserError as error:
            assert "1.png" in str(error)
        else:
            assert served.fetch(torch.tensor([1]), None)["x0"].shape == expected.shape


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda f: None, "is empty"), (lambda f: f.rmdir(), "no folder"), (None, "beside class folders")],
)
def test_a_folder_that_cannot_serve_is_refused(tmp_path, make, words):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if make is None:
        _picture(folder / "a.png", np.zeros((4, 4)))
        _picture(folder / "cat" / "b.png", np.zeros((4, 4)))
    else:
        make(folder)
    with pytest.raises(UserError, match=words):
        _source(folder)


def test_content_keys_follow_pixels_size_and_labels(folder):
    key = _source(folder).content_key()
    assert key == _source(folder, flip=True).content_key()  # flips are drawn, not content
    assert key != _source(folder, size=4).content_key()
    _picture(folder / "0.png", np.zeros((8, 8)))
    assert key != _source(folder).content_key()
