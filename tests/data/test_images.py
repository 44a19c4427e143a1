"""Digits and Fashion-MNIST: content, range, sizes, speed, and idx files that are missing or damaged."""

import gzip
import timeit

import numpy as np
import pytest
import torch

from fewstep.data.images import area_resize, read_idx, to_uint8
from fewstep.data.registry import make_source
from fewstep.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return make_source({"source": "digits"})


def test_digits_are_those_of_scikit_learn(digits):
    data = pytest.importorskip("sklearn.datasets").load_digits()
    rows = digits.fetch(torch.arange(len(digits)), None)
    assert torch.equal(rows["x0"][:, 0], torch.from_numpy(data.images / 8 - 1).float())
    assert torch.equal(rows["cond"]["label"], torch.from_numpy(data.target))


def test_rows_come_in_the_order_of_the_ids_with_repeats(digits):
    ids = torch.tensor([5, 0, 5])
    rows = digits.fetch(ids, None)
    assert rows["x0"].shape == (3, *digits.row_shape) == (3, 1, 8, 8)
    assert torch.equal(rows["x0"][0], rows["x0"][2])
    assert rows["cond"]["label"].tolist() == [5, 0, 5]
    assert (rows["x0"].min(), rows["x0"].max()) == (-1, 1)


def test_a_fetch_does_not_change_what_the_next_one_gives(digits):
    ids = torch.arange(4)
    first = digits.fetch(ids, None)["x0"]
    kept = first.clone()
    first.zero_()
    assert torch.equal(digits.fetch(ids, None)["x0"], kept)


def test_fetching_128_digits_takes_less_than_a_third_of_a_millisecond(digits):
    ids = torch.arange(128)
    seconds = min(timeit.repeat(lambda: digits.fetch(ids, None), number=20, repeat=20)) / 20
    assert seconds < 3e-4


@pytest.mark.parametrize("size", [28, 16])
@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 2_000)])
def test_the_shipped_fashion_mnist_has_both_sizes(size, split, count):
    source = make_source({"source": "fashion_mnist", "size": size, "split": split})
    rows = source.fetch(torch.arange(len(source)), None)
    assert rows["x0"].shape == (count, 1, size, size)
    assert (rows["x0"].min(), rows["x0"].max()) == (-1, 1)
    if split == "train":
        assert rows["cond"]["label"].bincount().tolist() == [1000] * 10  # stratified


def test_the_subset_is_a_part_of_the_full_set():
    full = {"source": "fashion_mnist", "split": "test", "full": True}
    try:
        whole = make_source(full)
    except UserError as missing:
        pytest.skip(str(missing))
    part = make_source({"source": "fashion_mnist", "split": "test"})
    ids = torch.arange(len(part))
    assert len(whole) == 10_000
    assert torch.equal(whole.fetch(ids, None)["x0"], part.fetch(ids, None)["x0"])
    assert whole.content_key() != part.content_key()


def test_missing_idx_files_name_the_package_to_install(tmp_path):
    with pytest.raises(UserError, match="install the Debian package dataset-fashion-mnist"):
        make_source({"source": "fashion_mnist", "path": str(tmp_path)})


@pytest.mark.parametrize("raw", [b"", b"\x00\x00\x08\x03abc", b"\x00\x00\x08\x01\x00\x00\x00\x05abc", b"not an idx"])
def test_a_damaged_idx_file_is_named(tmp_path, raw):
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match="train-images"):
        read_idx(file)
    file.write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x02ab")[:-9])
    with pytest.raises(UserError, match="train-images"):
        read_idx(file)


def test_an_idx_file_need_not_be_gzipped(tmp_path):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (tmp_path / "x").write_bytes(b"\x00\x00\x08\x02" + np.array([3, 4], ">u4").tobytes() + array.tobytes())
    assert np.array_equal(read_idx(tmp_path / "x"), array)


def test_area_resizing_averages_over_the_area_a_pixel_covers():
    halves = torch.tensor([[0, 100, 10, 30], [100, 200, 50, 70]], dtype=torch.uint8)[None, None]
    assert area_resize(halves, 1).item() == 70  # the mean of all eight
    third = torch.tensor([[30, 60, 90]], dtype=torch.uint8).expand(3, 3)[None, None]
    assert area_resize(third, 2)[0, 0].tolist() == [[40, 80]] * 2  # (30 + 60/2) / 1.5, (60/2 + 90) / 1.5
    noise = torch.randint(0, 256, (8, 1, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.allclose(area_resize(noise, 16).float().mean(), noise.float().mean(), atol=0.1)


def test_grey_levels_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
