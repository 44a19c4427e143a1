"""Captioned pictures: both forms of captions, decoding on demand, flips by address, and what is missing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.errors import UserError
from tests.data.tiny_captions import tiny_captions


@pytest.fixture
def folder(tmp_path):
    return tiny_captions(tmp_path / "pictures")


def _source(folder, **more):
    return make_source({"source": "captions", "path": str(folder), "size": 16, **more})


def _table(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def test_pictures_come_with_their_captions_in_the_order_of_the_table(folder):
    source = _source(folder)
    rows = source.fetch(torch.tensor([7, 2]), None)
    assert (len(source), source.row_shape, source.classes) == (8, (3, 16, 16), None)
    assert rows["prompt"] == ["digit seven", "digit two"]
    assert len(rows["cond"]) == 0
    pixels = np.asarray(Image.open(folder / "007.png"), np.float32)
    assert torch.allclose(rows["x0"][0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_text_files_beside_the_pictures_say_the_same(folder):
    table = _source(folder)
    (folder / "metadata.jsonl").unlink()
    for file, text in zip(table.files, table.prompts):
        file.with_suffix(".txt").write_text(text + "\n")
    beside = _source(folder)
    assert (beside.files, beside.prompts) == (table.files, table.prompts)
    assert beside.content_key() == table.content_key()


def test_a_table_may_say_caption_name_sub_folders_and_leave_pictures_out(folder):
    (folder / "deep").mkdir()
    (folder / "001.png").rename(folder / "deep" / "one.png")
    _table(folder, {"file_name": "deep/one.png", "caption": "eins"}, {"file_name": "000.png", "text": "null", "n": 3})
    source = _source(folder)
    assert source.prompts == ["eins", "null"]
    assert source.fetch(torch.arange(2), None)["x0"].shape == (2, 3, 16, 16)


def test_the_centre_square_is_kept(tmp_path):
    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, 4:12] = (255, 0, 255)
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("magenta")
    x0 = _source(tmp_path, size=8).fetch(torch.tensor([0]), None)["x0"]
    assert torch.equal(x0, torch.tensor([1.0, -1.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8))


def test_only_the_pictures_of_a_fetch_are_decoded(folder, monkeypatch):
    seen = []
    from fewstep.data import pictures

    decode = pictures.decode
    monkeypatch.setattr(pictures, "decode", lambda file, *more: seen.append(file.name) or decode(file, *more))
    source = _source(folder)
    assert seen == []
    source.fetch(torch.tensor([3, 5]), None)
    assert sorted(seen) == ["003.png", "005.png"]


def test_flips_depend_on_the_address_of_a_row_and_on_nothing_else(folder):
    source, ids = _source(folder, flip=True), torch.arange(8).repeat(10)
    plain = source.fetch(ids, None)["x0"]
    whole = source.fetch(ids, Draw(0, 7, np.arange(80)))
    part = source.fetch(ids[30:50], Draw(0, 7, np.arange(30, 50)))
    flipped = (whole["x0"] == plain.flip(-1)).all(-1).all(-1).all(-1)
    assert torch.equal(whole["x0"][30:50], part["x0"])
    assert whole["prompt"][30:50] == part["prompt"]
    assert ((whole["x0"] == plain).all(-1).all(-1).all(-1) | flipped).all()
    assert 20 < flipped.sum() < 60


def test_content_keys_follow_pictures_captions_and_size_but_not_flips(folder):
    key = _source(folder).content_key()
    assert _source(folder, flip=True).content_key() == key
    assert _source(folder, size=8).content_key() != key
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes())
    assert _source(folder).content_key() != key
    other = tiny_captions(folder.parent / "other")
    assert _source(other).content_key() == key
    (other / "metadata.jsonl").write_text((other / "metadata.jsonl").read_text().replace("digit", "number"))
    assert _source(other).content_key() != key


def test_a_picture_that_cannot_be_decoded_is_named_when_it_is_fetched(folder):
    (folder / "004.png").write_bytes(b"no picture")
    source = _source(folder)
    source.fetch(torch.arange(4), None)
    with pytest.raises(UserError, match=r"captions: cannot decode '.*004\.png'.*skip_corrupt"):
        source.fetch(torch.tensor([4]), None)


def test_skipped_pictures_are_counted_and_take_their_captions_along(folder):
    (folder / "004.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"left out 1 of 8 images.*004\.png"):
        source = _source(folder, skip_corrupt=True)
    assert len(source) == 7
    assert source.fetch(torch.tensor([4]), None)["prompt"] == ["digit five"]


def test_a_folder_of_nothing_but_broken_pictures_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no")
    (tmp_path / "a.txt").write_text("nothing")
    with pytest.raises(UserError, match="none of the 1 images"):
        _source(tmp_path, skip_corrupt=True)


def _bare(folder):
    (folder / "metadata.jsonl").unlink()


def _gone(folder):
    (folder / "003.png").unlink()


def _speechless(folder):
    _table(folder, {"file_name": "000.png", "text": "zero"}, {"file_name": "001.png", "text": None})


def _garbled(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "zero"}\n\n{"file_name"\n')


def _foreign(folder):
    (folder / "metadata.jsonl").write_bytes('{"file_name": "000.png", "text": "\xfc"}'.encode("latin-1"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_bare, r"'.*000\.png' has no caption: write '000\.txt' beside it"),
        (_gone, r"names '003\.png', which is not there"),
        (_speechless, r"line 2 .* has no caption for '001\.png'"),
        (_garbled, "line 3 .* is no"),
        (_foreign, "is not UTF-8"),
        (_table, "is empty"),
    ],
)
def test_what_is_missing_is_named(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        _source(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="captions: no folder"):
        _source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is empty"):
        _source(tmp_path)
