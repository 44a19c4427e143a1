"""Checkpoints are whole or absent, damage is named, and nothing is unpickled."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from fewstep.engine import checkpoint
from fewstep.errors import RunFailed, UserError

FILES = {"student.role": {"weight": torch.arange(6.0).reshape(2, 3)}, "method": {}}


def test_what_is_saved_is_read_back(tmp_path):
    checkpoint.save(tmp_path, 7, FILES, {"place": {"step": 7}})
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["place"] == {"step": 7}
    assert torch.equal(found.files["student.role"]["weight"], FILES["student.role"]["weight"])
    assert found.files["method"] == {}


@pytest.mark.parametrize("where", [0, 40, -1])
def test_a_flipped_byte_is_found_and_the_file_named(tmp_path, where):
    folder = checkpoint.save(tmp_path, 1, FILES, {})
    file = folder / "student.role.safetensors"
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"is damaged: student\.role\.safetensors differs"):
        checkpoint.load(folder)


def test_a_missing_file_is_named(tmp_path):
    folder = checkpoint.save(tmp_path, 1, FILES, {})
    (folder / "method.safetensors").unlink()
    with pytest.raises(UserError, match=r"method\.safetensors is missing"):
        checkpoint.load(folder)


def test_a_checkpoint_with_a_pickle_is_refused(tmp_path):
    folder = checkpoint.save(tmp_path, 1, FILES, {})
    (folder / "extra.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"holds a pickle \(extra\.pt\), which is never loaded"):
        checkpoint.load(folder)


@pytest.mark.parametrize("fails_at", range(1, 8))
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch, fails_at):
    checkpoint.save(tmp_path, 1, FILES, {})
    calls = 0
    fsync = os.fsync

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    try:
        checkpoint.save(tmp_path, 2, FILES, {})
    except RunFailed as error:
        assert "step-2': No space left on device. The last good checkpoint is" in str(error)
    monkeypatch.undo()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.files["student.role"]["weight"].shape == (2, 3)
    assert not list(tmp_path.glob(".writing-*"))


def test_a_folder_that_was_being_written_is_no_checkpoint_and_is_swept(tmp_path):
    checkpoint.save(tmp_path, 3, FILES, {})
    (tmp_path / ".writing-step-4").mkdir()
    assert checkpoint.steps(tmp_path) == [3]
    checkpoint.prune(tmp_path, keep_last=1, best=None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]


def test_pruning_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, FILES, {})
    checkpoint.prune(tmp_path, keep_last=2, best=1)
    assert checkpoint.steps(tmp_path) == [1, 3, 4]
