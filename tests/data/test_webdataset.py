"""Tar shards: the same rows as the folder they were packed from, in any order, with an index that is made once."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from fewstep.data import tar_index
from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.engine.feed import Feed
from fewstep.errors import RunFailed, UserError
from tests.data.tiny_shards import pack, tiny_shards


@pytest.fixture
def folder(tmp_path):
    return tiny_shards(tmp_path)


def _source(folder, path="train-*.tar", **more):
    return make_source({"source": "webdataset", "path": str(folder / path), "size": 16, **more})


def _members(folder):
    """Pictures and captions by the names of members, in order."""
    captions = [json.loads(line) for line in (folder / "pictures" / "metadata.jsonl").read_text().splitlines()]
    return {line["file_name"][:-4]: (folder / "pictures" / line["file_name"]).read_bytes() for line in captions}


def test_rows_are_those_of_the_folder_that_was_packed(folder):
    plain = make_source({"source": "captions", "path": str(folder / "pictures"), "size": 16, "flip": True})
    source = _source(folder, flip=True)
    ids = torch.tensor([7, 0, 5, 5, 4])
    assert (len(source), source.row_shape, source.buckets) == (8, (3, 16, 16), None)
    for draw in (lambda: None, lambda: Draw(1, 2, np.arange(5))):
        rows, expected = source.fetch(ids, draw()), plain.fetch(ids, draw())
        assert torch.equal(rows["x0"], expected["x0"])
        assert rows["prompt"] == expected["prompt"]


def test_json_members_say_the_same_as_text_members(tmp_path, folder):
    other = _source(tiny_shards(tmp_path / "json", as_json=True))
    assert other.fetch(torch.arange(8), None)["prompt"] == _source(folder).fetch(torch.arange(8), None)["prompt"]


def test_a_row_does_not_depend_on_the_batch_nor_on_how_shards_are_cut(tmp_path, folder):
    source, other = _source(folder), _source(tiny_shards(tmp_path / "other", (1, 1, 6)))
    whole = source.fetch(torch.arange(8), None)["x0"]
    for i in (3, 0, 7):
        assert torch.equal(source.fetch(torch.tensor([i]), None)["x0"][0], whole[i])
        assert torch.equal(other.fetch(torch.tensor([i, 2]), None)["x0"][0], whole[i])


def test_a_resumed_stream_is_the_uninterrupted_one(folder):
    def stream(feed, n):
        for _ in range(n):
            if feed.ended:
                feed.start_epoch()
            rows = feed.rows(feed.next(), None)
            yield rows.ids.tolist(), rows.prompt, rows.x0.sum().item()

    feed = Feed(_source(folder), "train", seed=3, batch=3)
    whole = list(stream(feed, 7))
    first = Feed(_source(folder), "train", seed=3, batch=3)
    halves = list(stream(first, 3))
    second = Feed(_source(folder), "train", seed=3, batch=3)
    second.load_state(first.state())
    assert halves + list(stream(second, 4)) == whole


def test_the_index_is_made_once_and_anew_when_a_shard_changes(folder, monkeypatch):
    made, make = [], tar_index.make_index
    monkeypatch.setattr(tar_index, "make_index", lambda shards: made.append(1) or make(shards))
    first = _source(folder)
    again = _source(folder)
    assert len(made) == 1
    assert torch.equal(first.fetch(torch.arange(8), None)["x0"], again.fetch(torch.arange(8), None)["x0"])
    assert first.called(6) == again.called(6) == "train-1.tar/006"
    pack(folder / "train-1.tar", {"new.png": _members(folder)["001"], "new.txt": b"fresh"})
    changed = _source(folder)
    assert (len(made), len(changed)) == (2, 6)
    assert changed.fetch(torch.tensor([5]), None)["prompt"] == ["fresh"]


def test_an_index_that_is_damaged_is_made_anew(folder):
    _source(folder)
    (index,) = folder.glob("fewstep-index-*.safetensors")
    index.write_bytes(index.read_bytes()[:40])
    assert len(_source(folder)) == 8


def test_the_index_may_lie_elsewhere(folder, tmp_path):
    _source(folder, index=str(tmp_path / "aside" / "index.safetensors"))
    assert (tmp_path / "aside" / "index.safetensors").is_file()
    assert not list(folder.glob("fewstep-index-*"))
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match="set `index: FILE` elsewhere"):
        _source(folder, index=str(tmp_path / "file" / "index"))


def test_globs_folders_and_single_shards_each_have_their_own_index(folder):
    assert len(_source(folder, "train-1.tar")) == 3
    assert len(_source(folder, ".")) == len(_source(folder)) == 8
    assert len(list(folder.glob("fewstep-index-*"))) == 2


def test_names_end_at_the_first_dot_and_folders_keep_samples_apart(folder):
    one, two, *_ = _members(folder).values()
    members = {"./a/1.png": one, "./b/1.png": two, "./a/1.seg.png": two, "./b/1.txt": b"b", "a/1.txt": b"a"}
    pack(folder / "odd.tar", {**members, "._a.png": b"resource fork", "a/notes.md": b"#"})
    source = _source(folder, "odd.tar")
    assert source.fetch(torch.arange(len(source)), None)["prompt"] == ["a", "b"]
    plain = _source(folder)
    assert torch.equal(source.fetch(torch.arange(2), None)["x0"], plain.fetch(torch.arange(2), None)["x0"])


def test_text_goes_before_json(folder):
    picture = _members(folder)["000"]
    pack(folder / "both.tar", {"1.png": picture, "1.json": b'{"caption": "no"}', "1.txt": b"yes"})
    assert _source(folder, "both.tar").caption(0) == "yes"


def test_a_member_that_cannot_be_decoded_is_named_when_it_is_fetched(folder):
    picture = _members(folder)["000"]
    pack(folder / "bad.tar", {"0.png": b"no", "0.txt": b"x", "1.png": picture, "1.txt": b"y"})
    source = _source(folder, "bad.tar")
    source.fetch(torch.tensor([1]), None)
    with pytest.raises(UserError, match=r"webdataset: cannot decode 'bad\.tar/0'.*skip_corrupt"):
        source.fetch(torch.tensor([0]), None)


def test_unusable_samples_are_left_out_counted_and_found_once(folder, monkeypatch):
    """No picture, no caption, a caption that is no text: three of five; the index remembers them."""
    picture = _members(folder)["003"]
    members = {"0.png": b"no", "0.json": b'{"caption": "x"}', "1.png": picture, "1.json": b'{"caption": "y"}'}
    members |= {"2.png": picture, "3.png": picture, "3.json": b'{"caption": 3}', "4.png": picture}
    pack(folder / "bad.tar", {**members, "4.txt": b"z"})
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"webdataset: left out 3 of 5 images .* the first is 'bad\.tar/0'"):
            source = _source(folder, "bad.tar", skip_corrupt=True)
        assert source.fetch(torch.arange(2), None)["prompt"] == ["y", "z"]
        assert source.called(0) == "bad.tar/1"
        monkeypatch.setattr(type(source), "sound", None)
    with pytest.raises(UserError, match=r"'bad\.tar/2' has no \.txt or \.json"):
        _source(folder, "bad.tar")


@pytest.mark.parametrize("how", ["half", "garbage"])
def test_a_shard_that_is_cut_off_is_refused_or_served_up_to_the_cut(folder, how):
    shard = folder / "train-0.tar"
    raw, source = shard.read_bytes(), _source(folder)
    end = int(source.index.picture[3, 0])  # the picture of sample 3 begins here
    shard.write_bytes(raw[: end + 20] if how == "half" else raw[: end - 512] + b"\x07" * 2048)
    with pytest.raises(UserError, match=r"the shard 'train-0\.tar' is cut off"):
        _source(folder)
    with pytest.warns(UserWarning, match=r"1 of 2 shards are cut off within a member, the first is 'train-0\.tar'"):
        left = _source(folder, skip_corrupt=True)
    assert [left.called(i) for i in range(len(left))] == [
        *(f"train-0.tar/00{i}" for i in range(3)),
        *(f"train-1.tar/00{i}" for i in range(5, 8)),
    ]


def test_a_missing_key_is_named_with_the_nearest(tmp_path):
    folder = tiny_shards(tmp_path, as_json=True)
    with pytest.raises(UserError, match=r"train-0\.tar/000' has no text 'captoin': .* did you mean 'caption'\?"):
        _source(folder, caption="captoin")


def test_what_is_no_shard_is_refused_with_the_mend(folder, tmp_path):
    with pytest.raises(UserError, match=r"no shard '.*' *: set `path` to a glob"):
        _source(folder, "train-{0..1}.tar")
    (folder / "text.tar").write_text("no archive")
    with pytest.raises(UserError, match=r"text\.tar' is no plain tar file .* unpack"):
        _source(folder, "text.tar")
    import gzip

    (folder / "packed.tar").write_bytes(gzip.compress((folder / "train-0.tar").read_bytes()))
    with pytest.raises(UserError, match=r"packed\.tar' is no plain tar file"):
        _source(folder, "packed.tar")
    with pytest.raises(UserError, match="no picture in the 1 shards"):
        _source(pack(folder / "bare.tar", {"a.txt": b"a"}).parent, "bare.tar")


def test_content_keys_follow_captions_and_pictures_and_not_the_place(folder, tmp_path):
    key = _source(folder).content_key()
    assert _source(folder, flip=True).content_key() == key
    assert _source(folder, size=8).content_key() != key
    other = tmp_path / "copy"
    other.mkdir()
    for shard in folder.glob("*.tar"):
        shutil.copy(shard, other)
        os.utime(other / shard.name, (0, 0))
    assert _source(other).content_key() == key
    raw = (other / "train-1.tar").read_bytes()
    (other / "train-1.tar").write_bytes(raw.replace(b"digit seven", b"digit eight"))
    assert _source(other).content_key() != key
