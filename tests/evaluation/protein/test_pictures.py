"""Pictures of chains: what they show, and that pages hold all they need."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from fewstep.data.chains import shipped
from fewstep.evaluation.protein.geometry import dihedrals
from fewstep.evaluation.protein.page import view
from fewstep.evaluation.protein.pictures import (
    DIHEDRALS,
    FINE,
    STRUCTURE,
    angle_plane,
    colours,
    level_of,
    plane,
    principal,
    smooth,
    traces,
)
from fewstep.evaluation.protein.preview import unpadded

from .chains import helix, mirrored, strand, turned

REAL = [c.x.astype(float) for c in shipped()[:4]]


def test_principal_axes_do_not_depend_on_how_a_chain_lies():
    assert principal(turned(REAL[0])) == pytest.approx(principal(REAL[0]), abs=1e-8)


def test_principal_axes_are_sorted_and_never_mirror():
    placed = principal(REAL[0])
    assert list(placed.std(0)) == sorted(placed.std(0), reverse=True)
    assert dihedrals(placed) == pytest.approx(dihedrals(REAL[0]))
    assert np.abs(principal(mirrored(REAL[0])) - placed).max() > 1


def test_a_smooth_line_goes_through_every_atom():
    path = smooth(REAL[0])
    assert path.shape == (FINE * (len(REAL[0]) - 1) + 1, 3)
    assert path[::FINE] == pytest.approx(REAL[0])
    line = np.linspace([0, 0, 0], [3, 6, 9], 4)
    assert np.diff(smooth(line)[FINE:-FINE], axis=0) == pytest.approx(np.full((FINE, 3), [0.25, 0.5, 0.75]))


def test_helices_and_strands_have_their_colours():
    pytest.importorskip("biotite")
    assert set(colours(helix())[2:-2]) == {STRUCTURE["h"]} and set(colours(strand())[2:-2]) == {STRUCTURE["s"]}
    along = colours(helix(), "position")
    assert len(set(along)) == 30 and along == colours(strand(), "position")


def test_traces_are_drawn_in_a_grid_of_one_scale():
    """Four columns, two rows; a chain twice as large covers a wider part of its cell."""
    picture = traces([*REAL, helix(20)], columns=4)
    assert picture.width == pytest.approx(2 * picture.height, abs=2)
    inked = np.asarray(traces([helix(20), 2 * helix(20)], columns=2).convert("L")) < 200
    half = inked.shape[1] // 2
    assert np.ptp(np.flatnonzero(inked[:, half:].any(0))) == pytest.approx(
        2 * np.ptp(np.flatnonzero(inked[:, :half].any(0))), rel=0.1
    )


def test_a_chain_that_is_not_finite_does_not_spoil_the_others():
    hurt = np.full((20, 3), np.nan)
    assert traces([hurt, REAL[0]], columns=2).size == traces([REAL[1], REAL[0]], columns=2).size
    assert angle_plane([hurt]).size == angle_plane(REAL, REAL).size
    assert '"name": "hurt"' not in view([hurt, REAL[0]], ["hurt", "whole"])


def test_a_helix_is_one_cell_of_the_plane_and_its_mirror_image_the_opposite_one():
    right, (first, second) = plane([helix()])
    left, _ = plane([mirrored(helix())])
    assert right.max() == pytest.approx(1) == left.max()
    (row, column), (row_left, column_left) = (np.unravel_index(d.argmax(), d.shape) for d in (right, left))
    assert row == row_left and first[row] <= 90.4 <= first[row + 1]
    assert second[column] <= 50 <= second[column + 1] and second[column_left] <= -50 <= second[column_left + 1]
    assert second[0] == DIHEDRALS[0]


def test_a_contour_holds_its_share():
    density = np.arange(1.0, 101).reshape(10, 10)
    for share in (0.5, 0.9):
        assert density[density >= level_of(density, share)].sum() / density.sum() == pytest.approx(share, abs=0.02)


def test_a_page_asks_nothing_of_the_network_and_holds_all_chains():
    page = view(REAL, ["a", "b", "</script><b>", "d"])
    assert not re.search(r"https?://|@import|url\(|src=|<link", page)
    assert page.count("</script>") == 1 and "<b>" not in page
    chains = json.loads(re.search(r"const chains = (.*);\n", page).group(1))
    assert [len(c["x"]) for c in chains] == [len(c["colours"]) for c in chains] == [len(x) for x in REAL]
    assert np.array(chains[0]["x"]) == pytest.approx(principal(REAL[0]), abs=0.051)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_a_page_draws_and_turns_without_changing_distances():
    """Run against a canvas that only counts: every piece is drawn; a drag turns, keeping the chain's size."""
    script = re.search(r"<script>(.*)</script>", view([REAL[0]], ["a"]), re.DOTALL).group(1)
    world = """
let lines = 0, handlers = {};
const canvas = { clientWidth: 100, getContext: () => new Proxy({}, { get: (_, k) => (...a) => { if (k === "lineTo") lines++; },
  set: () => true }), addEventListener: (k, f) => { handlers[k] = f; }, setPointerCapture: () => {} };
globalThis.document = { createElement: t => t === "canvas" ? canvas : { append() {} }, getElementById: () => ({ append() {} }),
  documentElement: {} };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "#fff" });
globalThis.window = { addEventListener() {}, matchMedia: () => ({ addEventListener() {} }) };
globalThis.requestAnimationFrame = f => f();
"""
    check = """
const size = () => Math.max(...views[0].path.map(turned).map(p => Math.hypot(...p)));
const first = lines, before = size(), place = turned([1, 0, 0]);
handlers.pointerdown({ clientX: 0, clientY: 0, pointerId: 1 });
handlers.pointermove({ clientX: 40, clientY: 25 });
const moved = turned([1, 0, 0]).map((v, i) => Math.abs(v - place[i]));
console.log(JSON.stringify({ first, again: lines, before, after: size(), moved: Math.max(...moved), orthogonal:
  times(turn, [0, 3, 6, 1, 4, 7, 2, 5, 8].map(i => turn[i])) }));
"""
    said = subprocess.run(["node", "-e", world + script + check], capture_output=True, text=True, timeout=60)
    found = json.loads(said.stdout) if said.returncode == 0 else pytest.fail(said.stderr)
    assert found["first"] == 3 * FINE * (len(REAL[0]) - 1) and found["again"] == 2 * found["first"]
    assert found["after"] == pytest.approx(found["before"]) and found["moved"] > 0.05
    assert found["orthogonal"] == pytest.approx([1, 0, 0, 0, 1, 0, 0, 0, 1], abs=1e-9)


def test_samples_lose_their_padding_and_become_angstrom():
    samples = torch.ones(2, 8, 3)
    mask = torch.arange(8)[None] < torch.tensor([5, 8])[:, None]
    found = unpadded(samples, mask)
    assert [x.shape for x in found] == [(5, 3), (8, 3)] and found[0].max() == 10
