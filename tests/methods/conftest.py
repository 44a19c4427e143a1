"""A small world of text, teachers and tokenizers, written once for each file of language tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import language


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("world")
    language.write(folder)
    return folder


@pytest.fixture
def cache(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained tokenizers are cached in the world's folder and not in the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))
