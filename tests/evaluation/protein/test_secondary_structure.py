"""P-SEA letters from CA atoms."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.data.chains import shipped
from fewstep.evaluation.protein.secondary_structure import backbone, secondary_structure, shares

from .chains import helix, strand, turned

pytest.importorskip("biotite")


def test_ideal_helix_and_strand_are_named():
    assert secondary_structure(helix()).strip("c") == "h" * 28
    assert secondary_structure(strand()).strip("c") == "s" * 27


def test_letters_do_not_change_when_a_chain_is_turned():
    x = shipped()[1].x.astype(float)
    assert secondary_structure(turned(x)) == secondary_structure(x)


def test_a_random_walk_has_little_structure():
    steps = np.random.default_rng(0).normal(size=(200, 3))
    walk = np.cumsum(3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True), 0)
    assert sum(shares(secondary_structure(walk))) < 0.1


def test_real_chains_have_helices_and_strands():
    """Over shipped chains a third is helix and a quarter strand, as in the Protein Data Bank."""
    found = np.array([shares(secondary_structure(c.x.astype(float))) for c in shipped()[::30]])
    helices, strands = found.mean(0)
    assert 0.25 < helices < 0.45 and 0.15 < strands < 0.35


@pytest.mark.parametrize("size", [1e-3, 1e3, 1e6, 1e30])
def test_samples_of_a_diverged_model_cost_no_memory(size):
    """Coordinates all over the place would make a grid of cells of any size; collapsed ones have no angles."""
    assert set(secondary_structure(size * np.random.default_rng(0).normal(size=(48, 3)))) <= {"c", "h", "s"}
    assert secondary_structure(np.zeros((48, 3))) == "c" * 48


def test_shares():
    assert shares("hhsc") == (0.5, 0.25)


def test_backbone_numbers_residues_from_one():
    atoms = backbone(helix(5))
    assert atoms.res_id.tolist() == [1, 2, 3, 4, 5] and set(atoms.atom_name) == {"CA"}
