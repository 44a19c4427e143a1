"""Buckets: sizes of equal area, the nearest one for a picture, and batches of one bucket in an order that resumes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.aspect import bucket_sizes, nearest_bucket
from fewstep.data.encoded import Encoded
from fewstep.data.image_folder import shape_of
from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.engine.feed import Feed
from fewstep.errors import UserError
from fewstep.methods.base import Selection
from tests.data.known_encoders import Around

SHAPES = [(16, 16)] * 5 + [(10, 22)] * 4 + [(40, 20)] * 6 + [(16, 17)]  # (height, width): 6 square, 4 wide, 6 high


@pytest.fixture
def folder(tmp_path):
    """Pictures whose colour says their number."""
    lines = []
    for i, (height, width) in enumerate(SHAPES):
        Image.fromarray(np.full((height, width, 3), 10 * i, np.uint8)).save(tmp_path / f"{i:02d}.png")
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"number {i}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def _source(folder, **more):
    said = {"source": "captions", "path": str(folder), "size": 16, "buckets": True, "multiple": 4, **more}
    return make_source(said)


@pytest.mark.parametrize(("size", "multiple"), [(1024, 64), (512, 64), (512, 8), (768, 32), (16, 4)])
def test_sides_are_multiples_and_no_bucket_has_more_area_than_the_square(size, multiple):
    sizes = bucket_sizes(size, multiple)
    assert sizes[0] == (size, size)
    assert len(set(sizes)) == len(sizes) and {(w, h) for h, w in sizes} == set(sizes)
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0 <= size * size - height * width < multiple * max(height, width)
        assert max(height, width) <= 2 * min(height, width)


def test_the_buckets_of_sdxl_are_among_its_own():
    """Of the sizes in table 8 of arXiv:2307.01952 those of aspect 1/2 to 2 with an area of at most 1024^2."""
    assert {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344)} <= set(
        bucket_sizes(1024, 64)
    )


def test_a_size_that_is_no_multiple_is_refused():
    with pytest.raises(UserError, match="size=500 is no multiple of 64, as buckets need: choose 448"):
        bucket_sizes(500, 64)


def test_a_picture_goes_to_the_bucket_of_the_nearest_aspect():
    sizes = [(16, 16), (12, 20), (20, 12)]
    assert nearest_bucket([(100, 100), (300, 500), (9, 5), (1, 99), (100, 128), (100, 130)], sizes).tolist() == [
        *(0, 1, 2, 1),
        *(0, 1),  # the middle between 1 and 5/3 is (5/3)^(1/2) = 1.29
    ]


def test_the_shape_is_that_after_the_exif_turn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert shape_of(tmp_path / "a.jpg") == (20, 10)
    (tmp_path / "b.jpg").write_bytes(b"no")
    assert shape_of(tmp_path / "b.jpg") is None


def test_training_rows_have_the_size_of_their_bucket_and_all_others_are_squares(folder):
    source = _source(folder)
    draw = Draw(0, 0, np.arange(2))
    for ids, size in (([0, 15], (16, 16)), ([5, 8], (12, 20)), ([9, 14], (20, 12))):
        assert source.fetch(torch.tensor(ids), draw)["x0"].shape == (2, 3, *size)
        assert source.sizes[source.buckets[ids[0]]] == size
    assert torch.equal(
        source.fetch(torch.arange(16), None)["x0"], _source(folder, buckets=False).fetch(torch.arange(16), None)["x0"]
    )
    with pytest.raises(UserError, match="pictures of 3 buckets cannot stand in one batch"):
        source.fetch(torch.tensor([0, 5, 9]), Draw(0, 0, np.arange(3)))


def test_only_what_lies_outside_of_the_aspect_is_cropped(tmp_path):
    """A 20 x 40 picture in a bucket of 12 x 20: the middle 33 1/3 columns; left and right of them nothing is seen."""
    pixels = np.full((20, 40, 3), 255, np.uint8)
    pixels[:, :2], pixels[:, -2:] = 0, 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("white")
    x0 = _source(tmp_path).fetch(torch.tensor([0]), Draw(0, 0, np.arange(1)))["x0"]
    assert torch.equal(x0, torch.ones(1, 3, 12, 20))


def _ids(feed, batches):
    for _ in range(batches):
        if feed.ended:
            feed.start_epoch()
        yield feed.next().tolist()


def test_a_batch_holds_one_bucket_and_an_epoch_every_full_batch_of_each(folder):
    source = _source(folder)
    feed = Feed(source, "train", seed=0, batch=2)
    assert feed.per_epoch == 3 + 2 + 3
    first, second = list(_ids(feed, 8)), list(_ids(feed, 8))
    for batches in (first, second):
        assert all(len(set(source.buckets[ids].tolist())) == 1 for ids in batches)
        assert sorted(np.concatenate(batches)) == list(range(16))
    assert first != second
    assert first == list(_ids(Feed(source, "train", seed=0, batch=2), 8))
    assert first != list(_ids(Feed(source, "train", seed=1, batch=2), 8))
    rest = Feed(source, "train", seed=0, batch=2)
    rest.load_state(_after(source, 5).state())
    assert list(_ids(rest, 11)) == (first + second)[5:]


def _after(source, batches):
    feed = Feed(source, "train", seed=0, batch=2)
    list(_ids(feed, batches))
    return feed


def test_small_buckets_are_left_out_and_counted(folder):
    source = _source(folder)
    with pytest.warns(UserWarning, match=r"data\.train: left out 4 of 16 samples, .* a batch of 6"):
        feed = Feed(source, "train", seed=0, batch=6)
    assert feed.per_epoch == 2
    with pytest.raises(UserError, match=r"no bucket holds a batch of 7: lower train\.batch"):
        Feed(source, "train", seed=0, batch=7)


def test_a_selection_is_bucketed_and_groups_are_refused(folder):
    feed = Feed(_source(folder), "train", seed=0, batch=2)
    feed.select(Selection(torch.tensor([9, 0, 1, 10, 2, 3])))
    assert feed.per_epoch == 3
    assert sorted(feed.selection.ids[np.concatenate(list(_ids(feed, 3)))].tolist()) == [0, 1, 2, 3, 9, 10]
    with pytest.raises(UserError, match="comes in groups, which buckets would split"):
        feed.select(Selection(torch.arange(16), group=2))


def test_an_offline_pass_is_in_order(folder):
    assert Feed(_source(folder), "train", seed=0, batch=16, shuffle=False).next().tolist() == list(range(16))


def test_latents_follow_the_buckets(folder):
    source = Encoded(_source(folder), Around())
    assert source.row_shape == (3, 8, 8)
    ids = torch.tensor([9, 12])
    wide = source.fetch(ids, Draw(0, 0, np.arange(2)))["x0"]
    assert wide.shape == (2, 3, 10, 6)
    assert torch.equal(wide[1:], source.fetch(ids[1:], Draw(0, 0, np.arange(1, 2)))["x0"])


def test_buckets_of_every_source_follow_the_pictures_shapes(folder, tmp_path):
    from tests.data.tiny_shards import pack

    members = {f.name: f.read_bytes() for f in sorted(folder.glob("*.png"))}
    pack(tmp_path / "s" / "a.tar", {**members, **{n.replace("png", "txt"): b"x" for n in members}})
    packed = make_source(
        {"source": "webdataset", "path": str(tmp_path / "s"), "size": 16, "buckets": True, "multiple": 4}
    )
    assert torch.equal(packed.buckets, _source(folder).buckets)
    assert packed.buckets.bincount().tolist() == [6, 4, 6]


def test_a_picture_without_a_readable_header_is_named_at_the_start(folder):
    (folder / "03.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot decode '.*03\.png'"):
        _source(folder)
    with pytest.warns(UserWarning, match="left out 1 of 16"):
        assert len(_source(folder, skip_corrupt=True).buckets) == 15


def test_buckets_change_the_content_key_and_nothing_changes_without_them(folder):
    plain = _source(folder, buckets=False)
    assert plain.content_key() == _source(folder, buckets=False, multiple=8).content_key()
    assert plain.content_key() != _source(folder).content_key()
