"""Stores: rows under sample ids, committed whole or not at all, and keyed by what they were made from."""

from __future__ import annotations

import errno
import json
import os
import time

import numpy as np
import pytest
import torch

from fewstep import store as module
from fewstep.errors import RunFailed, UserError
from fewstep.store import Store, content_key


def rows(ids: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {"logits": scale * torch.stack([ids, -ids], -1).float(), "label": ids % 3}


def filled(folder, n: int = 10, key: str = "one", scale: float = 1.0) -> Store:
    store = Store(folder, "soft")
    ids = torch.arange(n)
    store.write(ids, **rows(ids, scale))
    store.commit(key, {"scale": scale})
    return store


def same(a: Store, b: Store) -> bool:
    columns = zip(a.read(a.ids()).items(), b.read(a.ids()).items(), strict=True)
    return torch.equal(a.ids(), b.ids()) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in columns)


def test_rows_come_back_in_the_order_of_the_ids_asked_for(tmp_path):
    store = Store(tmp_path, "soft")
    for ids in (torch.tensor([70, 3, 2**40]), torch.tensor([-5, 8])):
        store.write(ids, **rows(ids))
    asked = torch.tensor([8, 70, 8, 2**40])
    read = store.read(asked)
    assert torch.equal(read["logits"][:, 0], asked.float()) and torch.equal(read["label"], asked % 3)
    assert store.ids().tolist() == [70, 3, 2**40, -5, 8] and len(store) == 5
    assert 70 in store and 71 not in store and store.columns() == ("logits", "label")


def test_what_is_read_is_a_copy(tmp_path):
    store = filled(tmp_path)
    store.read(torch.tensor([1]))["logits"].zero_()
    assert store.read(torch.tensor([1]))["logits"].tolist() == [[1, -1]]


def test_a_later_write_replaces_and_the_last_of_equal_ids_wins(tmp_path):
    store = filled(tmp_path, 3)
    store.write(torch.tensor([2, 9, 2]), logits=torch.tensor([[1.0, 1], [2, 2], [3, 3]]), label=torch.tensor([0, 1, 2]))
    assert store.ids().tolist() == [0, 1, 2, 9]
    assert store.read(torch.tensor([2, 9, 1]))["logits"].tolist() == [[3, 3], [2, 2], [1, -1]]


def test_columns_grow_over_many_small_writes(tmp_path):
    store = Store(tmp_path, "soft")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for ids in order.split(7):
        store.write(ids, **rows(ids))
    assert torch.equal(store.read(torch.arange(1000))["logits"], rows(torch.arange(1000))["logits"])


def test_a_missing_id_is_named_with_the_mend(tmp_path):
    with pytest.raises(UserError, match=r"store 'soft' holds 10 samples and not number 12: run the stage that writes"):
        filled(tmp_path).read(torch.tensor([3, 12, 13]))


@pytest.mark.parametrize(
    "columns",
    [
        {"logits": torch.zeros(2, 2)},
        {"logits": torch.zeros(2, 3), "label": torch.zeros(2, dtype=torch.int64)},
        {"logits": torch.zeros(2, 2).double(), "label": torch.zeros(2, dtype=torch.int64)},
        {"logits": torch.zeros(3, 2), "label": torch.zeros(2, dtype=torch.int64)},
    ],
    ids=["column missing", "other shape", "other dtype", "too many rows"],
)
def test_rows_that_do_not_fit_the_columns_are_refused_and_change_nothing(tmp_path, columns):
    store = filled(tmp_path, 3)
    with pytest.raises(ValueError, match="store 'soft'"):
        store.write(torch.tensor([1, 50]), **columns)
    assert same(store, Store.open(tmp_path, "soft")) and 50 not in store and store.key == "one"


def test_a_committed_store_opens_with_equal_rows_key_and_meta(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 100)  # four rows of 24 bytes
    written = filled(tmp_path)
    opened = Store.open(tmp_path, "soft")
    assert len(list((tmp_path / "soft").glob("*.safetensors"))) == 3
    assert same(written, opened) and opened.columns() == ("logits", "label")
    assert opened.key == written.key == "one" and opened.meta == {"scale": 1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool, torch.int32])
def test_every_kind_of_column_survives_the_disk(tmp_path, dtype):
    store = Store(tmp_path, "soft")
    columns = {"a": torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype), "scalar": torch.ones(2, dtype=dtype)}
    store.write(torch.tensor([4, 2]), **columns)
    store.commit("k", {"shape": (1, 2), 3: None})
    read = Store.open(tmp_path, "soft").read(torch.tensor([2]))
    assert read["a"].dtype == dtype and read["a"].tolist() == [[0, 1, 1]] and read["scalar"].shape == (1,)


def test_the_key_stands_for_the_rows_as_committed(tmp_path):
    store = filled(tmp_path)
    store.write(torch.tensor([1]), **rows(torch.tensor([1])))
    assert store.key is None and Store.open(tmp_path, "soft").key == "one"
    store.commit("two", {})
    assert store.key == Store.open(tmp_path, "soft").key == "two"


def test_nothing_committed_opens_empty(tmp_path):
    store = Store.open(tmp_path, "soft")
    assert store.key is None and len(store) == 0 and store.columns() == () and not (tmp_path / "soft").exists()


def test_clear_forgets_rows_and_columns_but_not_the_disk(tmp_path):
    store = filled(tmp_path)
    store.clear()
    assert len(store) == 0 and store.key is None and len(Store.open(tmp_path, "soft")) == 10
    store.write(torch.tensor([1]), other=torch.ones(1))
    assert store.columns() == ("other",)


def test_an_empty_store_can_be_committed(tmp_path):
    Store(tmp_path, "soft").commit("none", {})
    assert Store.open(tmp_path, "soft").key == "none"


def test_a_commit_leaves_no_files_of_the_version_before(tmp_path):
    filled(tmp_path, scale=1.0)
    filled(tmp_path, scale=2.0, key="two")
    assert len(list((tmp_path / "soft").iterdir())) == 2
    assert Store.open(tmp_path, "soft").read(torch.tensor([3]))["logits"].tolist() == [[6, -6]]


@pytest.mark.parametrize("which", ["*.safetensors", "index.json"])
def test_any_flipped_byte_is_found_and_the_file_named(tmp_path, which):
    filled(tmp_path)
    file = next((tmp_path / "soft").glob(which))
    whole = file.read_bytes()
    for place in range(0, len(whole), 11):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        if which == "index.json" and json_equal(file.read_bytes(), whole):
            continue
        with pytest.raises(UserError, match=f"{file.name} is damaged: delete its folder"):
            Store.open(tmp_path, "soft")
    file.write_bytes(whole)
    assert len(Store.open(tmp_path, "soft")) == 10


def json_equal(damaged: bytes, whole: bytes) -> bool:
    """A flip in white space changes nothing."""
    try:
        return json.loads(damaged) == json.loads(whole)
    except ValueError:
        return False


def test_a_missing_shard_is_named(tmp_path):
    filled(tmp_path)
    shard = next((tmp_path / "soft").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=f"cannot read .*{shard.name}"):
        Store.open(tmp_path, "soft")


def test_a_store_of_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 2)
    filled(tmp_path)
    monkeypatch.setattr(module, "FORMAT", 1)
    with pytest.raises(UserError, match=r"has format 2 and this version reads 1: install a newer fewstep"):
        Store.open(tmp_path, "soft")


def killed_at(fsync: int, folder) -> bool:
    """Commits a second version in a child process killed at its n-th fsync; False if it got through."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = [fsync]

    def die(_descriptor):
        left[0] -= 1
        if not left[0]:
            os._exit(9)

    os.fsync = die
    try:
        filled(folder, n=12, key="two", scale=2.0)
    finally:
        os._exit(0)


def test_a_commit_killed_at_any_moment_leaves_one_version_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    old, new = filled(tmp_path / "old"), filled(tmp_path / "new", n=12, key="two", scale=2.0)
    keys = []
    for fsync in range(1, 100):
        folder = tmp_path / str(fsync)
        filled(folder)
        died = killed_at(fsync, folder)
        store = Store.open(folder, "soft")
        keys.append(store.key)
        assert same(store, old if store.key == "one" else new)
        if not died:
            break
    assert keys == ["one"] * 7 + ["two"] * 2  # three shards and the index, two fsyncs each; the rename decides
    filled(tmp_path / "1", key="three")
    assert not list((tmp_path / "1" / "soft").glob("*.aside"))


@pytest.mark.parametrize("writes", range(4))
def test_a_full_disk_keeps_the_old_version_and_leaves_nothing_half_written(tmp_path, monkeypatch, writes):
    monkeypatch.setattr(module, "SHARD_BYTES", 100)
    old = filled(tmp_path)
    files = sorted(file.name for file in (tmp_path / "soft").iterdir())
    left = [writes]

    def full(_descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"store 'soft' was not saved, its last version is whole: .*No space left"):
        filled(tmp_path, n=12, key="two", scale=2.0)
    assert sorted(file.name for file in (tmp_path / "soft").iterdir()) == files
    assert same(Store.open(tmp_path, "soft"), old)


def test_reading_a_batch_is_a_matter_of_microseconds(tmp_path):
    store = Store(tmp_path, "soft")
    ids = torch.arange(50_000)
    store.write(ids, logits=torch.zeros(50_000, 10))
    asked = ids[::390][:128]
    times = []
    for _ in range(50):
        start = time.perf_counter()
        store.read(asked)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-4


def test_equal_contents_have_equal_keys_however_they_are_held(tmp_path):
    parts = {"b": [1, 2.5, None, True, "x"], "a": {"t": torch.arange(6).reshape(2, 3)}}
    key = content_key(parts, np.arange(3))
    assert len(key) == 64
    again = {"a": {"t": torch.arange(6).reshape(3, 2).reshape(2, 3)}, "b": (1, 2.5, None, True, "x")}
    assert content_key(again, np.arange(6)[::2] // 2) == key
    assert content_key(torch.arange(6).reshape(2, 3).T) == content_key(torch.arange(6).reshape(2, 3).T.contiguous())
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "file.txt").write_text("text")
    assert content_key(tmp_path / "one") == content_key(tmp_path / "two")


def test_different_contents_have_different_keys(tmp_path):
    for name, text in {"a": "text", "b": "other"}.items():
        (tmp_path / f"dir_{name}").mkdir()
        (tmp_path / name).write_text(text)
        (tmp_path / f"dir_{name}" / name).write_text("text")
    different = [
        [1], [1.0], [True], ["1"], [None], [[1]], [1, 1], [[1, 1]], [[1], 1], [1, [1]], [{}], [[]], [""], ["", ""],
        [{"a": 1}], [{"a": 2}], [{"b": 1}], [["a", 1]], ["a1"], [torch.tensor(1)], [torch.tensor([1])],
        [torch.tensor([1.0])], [torch.tensor([1], dtype=torch.int32)], [torch.zeros(2, 3)], [torch.zeros(3, 2)],
        [torch.zeros(2, 3).bfloat16()], [np.array([1])], [np.zeros((2, 3))], [np.float64(1)], [torch.zeros(0)],
        [tmp_path / "a"], [tmp_path / "b"], [tmp_path / "dir_a"], [tmp_path / "dir_b"], ["text"], [str(tmp_path / "a")],
    ]  # fmt: skip
    assert len({content_key(*parts) for parts in different}) == len(different)


@pytest.mark.parametrize("part", [object(), {1, 2}, np.array([object()])], ids=["object", "set", "object array"])
def test_what_has_no_stable_content_is_refused(part):
    with pytest.raises(TypeError, match="content_key cannot hash"):
        content_key([part])
