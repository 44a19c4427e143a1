"""A process that has only diffusers makes the trainer's images."""

from __future__ import annotations

import pytest

from fewstep.draws import Draw
from fewstep.errors import RunFailed, UserError
from fewstep.exporting import reload
from fewstep.exporting.pipeline import addresses
from fewstep.exporting.reload import reload_check
from fewstep.models.registry import FAMILIES

from .students import SHIFTED, student


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    s = student("dit", SHIFTED, "renoise", 4, guidance=2.0)
    return s, s.export(tmp_path_factory.mktemp("reload") / "m")


def _given(s, n=3):
    noise = addresses(Draw.for_images(0, range(n)))
    start, *later = [noise(i, (n, *s.family.row_shape(s.module))) for i in range(s.schedule.steps)]
    return 2 * s.images(n) - 1, start, s.labels(n), later


def test_a_fresh_process_makes_the_same_images(own):
    s, folder = own
    assert 0 <= reload_check(folder, *_given(s)) < 1e-5


def test_other_images_fail_the_run(own, monkeypatch):
    s, folder = own
    monkeypatch.setattr(reload, "fresh_samples", lambda *_: s.images(3).roll(1, 0))
    with pytest.raises(RunFailed, match="does not make the trained samples"):
        reload_check(folder, *_given(s))
    monkeypatch.setattr(reload, "fresh_samples", lambda *_: s.images(3) * float("nan"))
    with pytest.raises(RunFailed, match="nan"):
        reload_check(folder, *_given(s))


def test_a_folder_that_needs_fewstep_fails_the_run(own):
    s, folder = own
    file = folder / "pipeline_fewstep_class_v1.py"
    kept = file.read_text()
    file.write_text("import fewstep\n" + kept)
    try:
        with pytest.raises(RunFailed, match=r"only diffusers.*fewstep"):
            reload_check(folder, *_given(s))
    finally:
        file.write_text(kept)


def test_a_folder_without_pipeline_has_nothing_to_compare(tmp_path):
    from fewstep.exporting.folder import export

    cnn = FAMILIES.get("cnn").build(width=4, classes=2)
    folder = export(cnn.module, FAMILIES.get("cnn"), None, None, tmp_path / "m", card={})
    with pytest.raises(UserError, match="no pipeline"):
        reload_check(folder, *_given(student("unet2d")))
