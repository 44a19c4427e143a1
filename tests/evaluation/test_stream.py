"""Folders through a network: the moments are those of all features, memory is flat, bad folders are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation.features import feature_network
from fewstep.evaluation.fid import Moments, frechet_distance
from fewstep.evaluation.statistics import read_statistics, write_statistics
from fewstep.evaluation.stream import folder_moments, folder_statistics, image_batches, streamed_moments

from .peak_memory import needs_proc, peak_megabytes


def _write(folder, sizes, mode="RGB"):
    folder.mkdir()
    rng = np.random.default_rng(len(sizes))
    for i, (width, height) in enumerate(sizes):
        shape = (height, width) if mode == "L" else (height, width, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def network():
    return feature_network("digits-cnn")


def test_batches_hold_the_pictures_in_the_order_of_their_names(tmp_path):
    folder = _write(tmp_path / "a", [(9, 7)] * 5)
    batches = list(image_batches(folder, rows=2))
    assert [b.shape for b in batches] == [(2, 3, 7, 9), (2, 3, 7, 9), (1, 3, 7, 9)]
    for i, image in enumerate(torch.cat(batches)):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(folder / f"{i:03d}.png")))


def test_a_folder_scores_the_same_in_any_batch_and_through_a_file(tmp_path, network):
    a, b = _write(tmp_path / "a", [(8, 8)] * 70, "L"), _write(tmp_path / "b", [(8, 8)] * 90, "L")
    images = [torch.cat(list(image_batches(folder))) for folder in (a, b)]
    whole = frechet_distance(*(Moments.of(network.features(x)) for x in images))
    assert frechet_distance(*(folder_moments(f, network, 17) for f in (a, b))) == pytest.approx(whole, rel=1e-6)
    write_statistics(folder_statistics(b, network, 17), tmp_path / "b.safetensors")
    reference = read_statistics(tmp_path / "b.safetensors", network)
    assert reference.n == 90
    assert frechet_distance(folder_moments(a, network, 17), reference) == pytest.approx(whole, rel=1e-6)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="is empty: no png, jpg, jpeg, webp file"):
        list(image_batches(tmp_path))


def test_pictures_of_two_sizes_are_refused_in_whatever_batch_they_meet(tmp_path):
    folder = _write(tmp_path / "a", [(8, 8)] * 3 + [(9, 8)])
    with pytest.raises(UserError, match=r"003.png' is 9x8 and .*000.png' is 8x8: all images of a score have one size"):
        list(image_batches(folder, rows=2))


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    folder = _write(tmp_path / "a", [(8, 8)] * 3)
    (folder / "001.png").write_bytes(b"GIF of another kind")
    with pytest.raises(UserError, match=r"cannot decode '.*001.png'"):
        list(image_batches(folder))


def test_no_batch_is_no_score(network):
    with pytest.raises(UserError, match="at least 2"):
        streamed_moments([], network)


@needs_proc
def test_memory_is_flat_from_a_thousand_rows_to_fifty_thousand():
    """50,000 rows of 512 numbers in float64 would be 205 MB."""
    before = (
        "import torch; from fewstep.evaluation.fid import Moments\n"
        "moments, block = Moments(512), torch.randn(500, 512)\n"
        "take = lambda batches: [moments.update(block + 1) and None for _ in range(batches)]; take(2)"
    )
    assert peak_megabytes(before, "take(98); assert moments.count == 50_000") < 10
