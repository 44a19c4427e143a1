"""Data sets of the library `datasets`: saved folders, files and the local cache give the rows that went in."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.errors import UserError
from tests.data.tiny_captions import tiny_captions

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path_factory):
    """Prepared files go to a folder of the test, and no bars are drawn."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("prepared"))
    datasets.disable_progress_bars()


@pytest.fixture
def pictures(tmp_path):
    return tiny_captions(tmp_path / "pictures")


def _rows(pictures):
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    images = [{"bytes": (pictures / line["file_name"]).read_bytes(), "path": None} for line in lines]
    return images, [line["text"] for line in lines]


def _dataset(images, texts, image="image", caption="text"):
    features = datasets.Features({image: datasets.Image(), caption: datasets.Value("string")})
    return datasets.Dataset.from_dict({image: images, caption: texts}, features=features)


def _source(path, **more):
    return make_source({"source": "datasets", "path": str(path), "size": 16, **more})


def _saved(pictures, tmp_path):
    _dataset(*_rows(pictures)).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def _splits(pictures, tmp_path):
    found = _dataset(*_rows(pictures))
    datasets.DatasetDict({"train": found, "test": found.select([0])}).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


def _parquet(pictures, tmp_path):
    found = _dataset(*_rows(pictures))
    (tmp_path / "files").mkdir()
    for part in range(2):
        found.select(range(4 * part, 4 * part + 4)).to_parquet(tmp_path / "files" / f"train-{part}.parquet")
    return tmp_path / "files" / "train-*.parquet"


def _parquet_folder(pictures, tmp_path):
    return _parquet(pictures, tmp_path).parent


def _json(pictures, tmp_path):
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    said = [{"image": line["file_name"], "text": line["text"]} for line in lines]
    (pictures / "table.jsonl").write_text("\n".join(map(json.dumps, said)) + "\n")
    return pictures / "table.jsonl"


@pytest.mark.parametrize("form", [_saved, _splits, _parquet, _parquet_folder, _json])
def test_rows_are_those_of_the_pictures_that_went_in(pictures, tmp_path, form):
    plain = make_source({"source": "captions", "path": str(pictures), "size": 16, "flip": True})
    source, ids = _source(form(pictures, tmp_path), flip=True), torch.tensor([7, 0, 5, 5])
    assert (len(source), source.row_shape) == (8, (3, 16, 16))
    for draw in (lambda: None, lambda: Draw(1, 2, np.arange(4))):
        rows, expected = source.fetch(ids, draw()), plain.fetch(ids, draw())
        assert torch.equal(rows["x0"], expected["x0"])
        assert rows["prompt"] == expected["prompt"]
    assert torch.equal(source.fetch(torch.tensor([5]), None)["x0"][0], source.fetch(ids, None)["x0"][2])


def test_splits_and_columns_are_chosen_by_name(pictures, tmp_path):
    images, texts = _rows(pictures)
    found = _dataset(images[3:], texts[3:], "photo", "legend")
    datasets.DatasetDict({"test": found}).save_to_disk(tmp_path / "named")
    source = _source(tmp_path / "named", split="test", image="photo", caption="legend")
    assert source.fetch(torch.tensor([0]), None)["prompt"] == [texts[3]]
    with pytest.raises(UserError, match=r"has no split 'tset': did you mean 'test'\?"):
        _source(tmp_path / "named", split="tset")
    with pytest.raises(UserError, match=r"has no column 'phot': set `image`; did you mean 'photo'\?"):
        _source(tmp_path / "named", split="test", image="phot", caption="legend")
    with pytest.raises(UserError, match=r"has no column 'text': set `caption`; known: legend, photo"):
        _source(tmp_path / "named", split="test", image="photo")
    with pytest.raises(UserError, match=r"the column 'legend' holds no pictures|cannot decode"):
        _source(tmp_path / "named", split="test", image="legend", caption="legend").fetch(torch.tensor([0]), None)


def test_a_column_of_numbers_holds_no_pictures(tmp_path):
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(UserError, match="the column 'image' holds no pictures but"):
        _source(tmp_path / "numbers")


def test_unusable_rows_are_named_or_on_request_left_out_and_counted(pictures, tmp_path):
    images, texts = _rows(pictures)
    images[1], images[2], texts[4] = {"bytes": b"no picture", "path": None}, None, None
    _dataset(images, texts).save_to_disk(tmp_path / "bad")
    source = _source(tmp_path / "bad")
    for i, words in (
        (1, r"cannot decode '.*bad\[1\]'"),
        (2, r"cannot decode '.*bad\[2\]'"),
        (4, r"bad\[4\]' has no text"),
    ):
        with pytest.raises(UserError, match=f"{words}.*skip_corrupt"):
            source.fetch(torch.tensor([i]), None)
    with pytest.warns(UserWarning, match=r"datasets: left out 3 of 8 images .*bad\[1\]'"):
        left = _source(tmp_path / "bad", skip_corrupt=True)
    assert left.fetch(torch.arange(5), None)["prompt"] == [texts[i] for i in (0, 3, 5, 6, 7)]
    assert left.called(1).endswith("bad[3]")


def test_an_empty_split_and_a_broken_file_are_refused(tmp_path):
    _dataset([], []).save_to_disk(tmp_path / "empty")
    _dataset([], []).to_parquet(tmp_path / "empty.parquet")
    for name in ("empty", "empty.parquet"):
        with pytest.raises(UserError, match=r"is empty|corresponds to no data"):
            _source(tmp_path / name)
    (tmp_path / "bad.parquet").write_bytes(b"nope")
    with pytest.raises(UserError, match=r"cannot open '.*bad\.parquet'") as caught:
        _source(tmp_path / "bad.parquet")
    assert "\n" not in str(caught.value)
    (tmp_path / "notes.md").write_text("#")
    with pytest.raises(UserError, match=r"notes\.md' is none of \.parquet"):
        _source(tmp_path / "notes.md")


def test_a_data_set_of_the_hub_is_read_from_the_local_cache_and_never_fetched_unasked(pictures, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", _watched(asked))
    with pytest.raises(UserError, match=r"set `download: true`, or run `hf download --repo-type dataset me/photos`"):
        _source("me/photos")
    snapshot = tmp_path / "hub" / "datasets--me--photos" / "snapshots" / ("0" * 40)
    (snapshot / "data").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    _dataset(*_rows(pictures)).to_parquet(snapshot / "data" / "train-00000-of-00001.parquet")
    assert len(_source("me/photos")) == 8
    assert asked == [True, True]
    with pytest.raises(UserError, match="no file or folder"):
        _source("no/such/place")


def _watched(asked):
    from huggingface_hub import snapshot_download

    def download(name, *, repo_type, local_files_only):
        asked.append(local_files_only)
        return snapshot_download(name, repo_type=repo_type, local_files_only=local_files_only)

    return download


def test_content_keys_follow_rows_and_sizes(pictures, tmp_path):
    images, texts = _rows(pictures)
    saved = _saved(pictures, tmp_path)
    key = _source(saved).content_key()
    assert _source(saved, flip=True).content_key() == key
    assert _source(saved, size=8).content_key() != key
    saved.rename(tmp_path / "moved")
    assert _source(tmp_path / "moved").content_key() == key
    _dataset(images, [*texts[:-1], "another"]).save_to_disk(tmp_path / "other")
    assert _source(tmp_path / "other").content_key() != key


def test_pictures_of_any_mode_come_in_rgb(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(file, "PNG")
    _dataset([{"bytes": file.getvalue(), "path": None}], ["white"]).save_to_disk(tmp_path / "grey")
    assert torch.equal(_source(tmp_path / "grey").fetch(torch.tensor([0]), None)["x0"], torch.ones(1, 3, 16, 16))
