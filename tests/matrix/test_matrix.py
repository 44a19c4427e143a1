"""Every mission method on every text-to-image family: trained, resumed, exported, loaded by diffusers; or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fewstep.engine.trainer import Trainer
from fewstep.errors import UserError

from .cell import Places, made, places, recipe, trained
from .families import FAMILIES
from .table import FILE, MENDS, REASONS, ROWS, Row, error, page

MISSION = {"twinflow", "scott", "self_e", "rg_lcd", "decoupled_dmd", "freeflow", "sid"}
CELLS = [(row, name) for row in ROWS for name in FAMILIES]
RUN = [cell for cell in CELLS if cell[0].reason(cell[1]) is None]
REFUSED = [cell for cell in CELLS if cell[0].reason(cell[1]) is not None]
QUICK = {  # one of each family, and each method
    "sd15": "sid, adapter",
    "sdxl": "decoupled_dmd, adapter",
    "sd3": "self_e, all weights, any number of steps, guided",
    "sana": "freeflow, all weights",
    "z_image": "twinflow, adapter, `sampler: few`",
    "qwen_image": "twinflow, all weights, any number of steps",
    "flux_dev": "rg_lcd, all weights, told its guidance",
    "flux_schnell": "decoupled_dmd, adapter",
    "lumina2": "sid, adapter",
    "pixart_sigma": "scott, adapter",
}


def named(cell: tuple[Row, str]) -> str:
    """The cell's id."""
    return f"{cell[0].title}-{cell[1]}"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Places]:
    """Tiny pipelines and data of all families."""
    root = tmp_path_factory.mktemp("matrix")
    return {name: places(family, root / name) for name, family in FAMILIES.items()}


def check(cell: tuple[Row, str], at: dict[str, Places], out: Path) -> None:
    """The whole way of a cell that runs."""
    row, name = cell
    trainer = trained(row, FAMILIES[name], at[name], out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert trainer.total == 2 and [line["step"] for line in lines] == [1, 2]
    assert any(line.get("grad_norm.student", 0) > 0 for line in lines)
    ours, theirs, said = made(trainer, FAMILIES[name])
    assert ours.std() > 0.02 and (ours - theirs).abs().max() < 1e-3
    assert (said["pipeline"] == FAMILIES[name].stock) == (row.sort(name) == "stock") == (not said["remote_code"])


@pytest.mark.parametrize("name", FAMILIES)
def test_one_recipe_of_each_family_goes_the_whole_way(name, at, tmp_path):
    """All others in the slow part."""
    (row,) = (row for row in ROWS if row.title == QUICK[name])
    check((row, name), at, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in RUN if QUICK[cell[1]] != cell[0].title], ids=named)
def test_a_recipe_goes_the_whole_way(cell, at, tmp_path):
    """Two steps in two runs, a folder, and the trainer's images by diffusers."""
    check(cell, at, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("cell", REFUSED, ids=named)
def test_a_recipe_is_refused_before_it_trains(cell, at, tmp_path):
    """In one line, which is the table's reason, and with its mend."""
    row, name = cell
    reason = row.reason(name)
    assert reason is not None
    with pytest.raises(UserError, match=re.escape(error(reason, FAMILIES[name]))):
        Trainer(recipe(row, FAMILIES[name], at[name], 1), tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


def test_the_page_is_the_table():
    """`python -m tests.matrix` writes it anew."""
    assert FILE.read_text() == page()


def test_the_table_has_every_mission_method_and_no_idle_reason():
    """Each method runs in some row on each family; what is refused is refused somewhere."""
    assert {row.method for row in ROWS} == MISSION and set(MENDS) == set(REASONS)
    assert {(row.method, name) for row, name in RUN} == {(method, name) for method in MISSION for name in FAMILIES}
    assert {row.reason(name) for row, name in REFUSED} == set(REASONS)
    assert len({row.title for row in ROWS}) == len(ROWS) and set(QUICK.values()) <= {row.title for row in ROWS}
