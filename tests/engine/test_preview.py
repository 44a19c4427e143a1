"""What a run writes of itself while it trains: images as grids, chains as traces and a page, others not at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fewstep.data.batch import Cond
from fewstep.engine.preview import ARTISTS, write_previews
from fewstep.engine.report import report
from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError
from fewstep.recipe import load_recipe

TINY = {"size": "tiny", "width": 32, "num_layers": 1, "num_heads": 2, "pair_width": 8, "cond_width": 16}


def method(samples, draws="images", **others):
    """As much of a method as previews look at."""
    return SimpleNamespace(draws=draws, samples=lambda rows, seed: samples, pictures=lambda rows, seed: {}, **others)


def test_images_are_a_grid_and_other_samples_are_not_written(tmp_path):
    assert write_previews(method(torch.zeros(4, 1, 8, 8)), 4, 0, tmp_path, 20).shape == (4, 1, 8, 8)
    assert Image.open(tmp_path / "step-000020.png").size[0] > 4 * 8
    assert write_previews(method(torch.zeros(4, 7)), 4, 0, tmp_path / "other", 20).shape == (4, 7)
    assert write_previews(method(None), 4, 0, tmp_path / "other", 20) is None
    assert not (tmp_path / "other").exists()


def test_chains_are_traces_a_plane_and_a_page(tmp_path):
    mask = torch.arange(16)[None] < torch.tensor([[12], [16]])
    said = method(torch.randn(2, 16, 3), "chains", preview_cond=lambda rows: Cond(mask=mask[:rows]))
    write_previews(said, 2, 0, tmp_path, 3)
    found = sorted(f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file())
    assert found == ["angles-and-dihedrals/step-000003.png", "step-000003.html", "step-000003.png"]
    page = (tmp_path / "step-000003.html").read_text()
    assert "12 residues" in page and "16 residues" in page


def test_a_kind_that_nobody_draws_is_named():
    with pytest.raises(UserError, match="unknown artist 'chain'"):
        ARTISTS.get("chain")


def test_a_run_that_makes_chains_shows_them_in_its_report(tmp_path):
    recipe = {
        "method": "protein_flow_matching",
        "student": {"from": "protein_flow", "build": TINY},
        "config": {"steps": 2, "weights": {"distogram": 0.0}},
        "data": {"train": {"source": "chains", "shortest": 40, "longest": 48}},
        "train": {"steps": 2, "batch": 2, "log_every": 1, "check_export": False},
        "preview": {"every": 1, "n": 4},
    }
    Trainer(load_recipe(recipe), tmp_path / "run", show=False).run()
    page = report(tmp_path / "run").read_text()
    assert page.count("data:image/png;base64,") == 2 * 2  # traces and planes of two steps
    assert "<h2>angles and dihedrals</h2>" in page and "<h2>Samples of step 2</h2>" in page
    assert page.count("<iframe") == 1 and 'sandbox="allow-scripts"' in page
