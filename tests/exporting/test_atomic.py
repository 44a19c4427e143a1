"""Folders appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from fewstep.errors import RunFailed
from fewstep.exporting.atomic import sha256, written_aside


def test_the_folder_appears_when_the_block_ends_and_not_before(tmp_path):
    out = tmp_path / "deep" / "model"
    with written_aside(out) as aside:
        (aside / "a").write_text("new")
        assert not out.exists() and aside.parent == out.parent
    assert (out / "a").read_text() == "new"
    assert [p.name for p in out.parent.iterdir()] == ["model"]


def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path):
    out = tmp_path / "model"
    with written_aside(out) as aside:
        (aside / "a").write_text("old")
    with pytest.raises(ValueError, match="broke"), written_aside(out) as aside:
        (aside / "a").write_text("half")
        raise ValueError("broke")
    assert (out / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_later_folder_replaces_an_earlier_one_wholly(tmp_path):
    for name in ("first", "second"):
        with written_aside(tmp_path / "model") as aside:
            (aside / name).write_text(name)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_a_failed_run_that_names_the_folder(tmp_path):
    with pytest.raises(RunFailed, match=r"cannot write '.*model': No space left"), written_aside(tmp_path / "model"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_when_the_last_rename_fails_the_earlier_folder_is_put_back(tmp_path, monkeypatch):
    out = tmp_path / "model"
    with written_aside(out) as aside:
        (aside / "a").write_text("old")
    real = os.replace

    def replace(source, target):
        if target == out and ".writing" in str(source) and not str(source).endswith("-old"):
            raise OSError(errno.EIO, "broken")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunFailed), written_aside(out) as aside:
        (aside / "a").write_text("new")
    assert (out / "a").read_text() == "old"


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = bytes(range(256)) * 9000  # more than one block
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()
