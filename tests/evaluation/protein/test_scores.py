"""Numbers of sets: invariances, calibration on real chains, chains that are wrong in one way."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.data.chains import shipped
from fewstep.evaluation.protein.geometry import distances
from fewstep.evaluation.protein.scores import (
    ALIGNED,
    FEATURES,
    MEANS,
    described,
    score_chains,
    set_distances,
    spread,
)

from .chains import helix, mirrored, strand, turned

pytest.importorskip("biotite")
pytest.importorskip("tmtools")

REAL = [c.x.astype(float) for c in shipped()]
FEW, OTHERS = REAL[5:3000:600], REAL[100:3000:400]


@pytest.fixture(scope="module")
def values() -> dict[str, float]:
    return score_chains(FEW, OTHERS)


def test_every_number_has_its_name(values):
    named = {f"w1_{name}" for name in (*FEATURES, "distances")}
    assert set(values) == {*MEANS, *ALIGNED, *named, "energy"}


def test_no_number_changes_when_chains_are_turned_and_moved(values):
    again = score_chains([turned(x, i) for i, x in enumerate(FEW)], [turned(x, 9 + i) for i, x in enumerate(OTHERS)])
    # an alignment is a search, which does not end in quite the same place
    assert {k: v for k, v in again.items() if k not in ALIGNED} == pytest.approx(
        {k: v for k, v in values.items() if k not in ALIGNED}, abs=1e-6
    )
    assert [again[k] for k in ALIGNED] == pytest.approx([values[k] for k in ALIGNED], abs=0.02)


def test_mirror_images_differ_in_handedness_and_in_what_dihedrals_tell():
    """Distances, contacts, the radius and the helices by distance stay; all become invalid."""
    chains = [helix(18), helix(20)]
    right, left = score_chains(chains), score_chains([mirrored(x) for x in chains])
    assert (right["valid"], left["valid"]) == (1, 0)
    assert (right["left_handed"], left["left_handed"]) == (0, 1)
    kept = [n for n in MEANS if n not in ("valid", "left_handed", "helix", "strand")]
    assert [left[n] for n in kept] == pytest.approx([right[n] for n in kept])
    assert left["helix"] > 0.8  # so the share of helix alone is fooled
    assert "diversity" not in left


def test_a_chain_that_is_wound_the_other_way_in_part_is_invalid():
    x = np.concatenate([helix(20), mirrored(helix(9)) + np.array([0, 0, 1.5 * 29])])
    found = described(x).shape
    assert 0 < found.left_handed < 0.5 and not found.valid


def test_random_coordinates_are_invalid_and_far_from_real_ones():
    rng = np.random.default_rng(0)
    noise = [7.0 * rng.normal(size=(100, 3)) for _ in range(8)]
    values = score_chains(noise, OTHERS)
    assert values["valid"] == 0 and values["bond_error"] > 3
    assert "novelty" not in values and values["energy"] > 1 and values["w1_distances"] > 1


def test_equal_sets_have_no_distance_and_no_novelty():
    values = score_chains(FEW, [turned(x) for x in FEW])
    assert values["novelty"] == pytest.approx(1, abs=1e-3)
    assert [values[k] for k in values if k.startswith("w1_")] == pytest.approx([0] * 5, abs=1e-6)
    assert values["energy"] == pytest.approx(0, abs=1e-4)


def test_copies_are_one_fold_and_different_chains_several(values):
    copies = score_chains([turned(FEW[0], i) for i in range(4)])
    assert copies["diversity"] == pytest.approx(1, abs=1e-3) and copies["folds"] == 0.25
    assert values["diversity"] < 0.5 and values["folds"] > 0.5


def test_distances_along_the_chain_are_measured_a_separation_at_a_time():
    """A chain stretched by 1.1: each distance grows by a tenth, over that separation's own standard deviation."""
    known = [described(x) for x in OTHERS]
    found = [described(1.1 * x) for x in OTHERS]
    pooled = [np.concatenate([distances(x, k) for x in OTHERS]) for k in range(2, 13)]
    expected = np.mean([0.1 * d.mean() / d.std() for d in pooled])
    assert set_distances(found, known)["w1_distances"] == pytest.approx(expected)


def test_coordinates_that_are_not_numbers_count_as_invalid_and_nowhere_else():
    hurt = FEW[0].copy()
    hurt[3] = np.nan
    with_hurt, without = score_chains([*FEW, hurt, FEW[0][:3]], OTHERS), score_chains(FEW, OTHERS)
    assert with_hurt.pop("valid") == pytest.approx(without.pop("valid") * len(FEW) / (len(FEW) + 2))
    assert with_hurt["w1_helix"] == pytest.approx(without["w1_helix"])
    assert with_hurt["bond"] == pytest.approx(without["bond"])


def test_compared_chains_are_spread_over_the_set():
    assert spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert spread([1, 2], 4) == [1, 2] and spread([], 4) == []


@pytest.mark.parametrize(
    "x, helices, strands", [(helix(), 28 / 30, 0), (strand(), 0, 27 / 30)], ids=["helix", "strand"]
)
def test_ideal_helix_and_strand_are_counted(x, helices, strands):
    found = described(x)
    assert (found.helix, found.strand) == pytest.approx((helices, strands))


def test_one_real_half_is_as_real_as_the_other():
    """What a perfect model of 150 chains would score against 150 real ones."""
    values = score_chains(REAL[::20], REAL[10::20], compared=12)
    assert values["valid"] > 0.95
    assert max(values[k] for k in values if k.startswith("w1_")) < 0.25
    assert values["energy"] < 0.3


@pytest.mark.slow
def test_all_shipped_chains_are_valid():
    """Calibration on 3,000 real chains: over 95 % valid, every limit met by over 99 %."""
    found = [described(x).shape for x in REAL]
    assert np.mean([s.valid for s in found]) > 0.99
    assert np.mean([s.clashes <= 0.01 for s in found]) > 0.99
    assert np.mean([s.bonded >= 0.98 for s in found]) > 0.99
    assert np.mean([s.left_handed > 0 for s in found]) < 0.001
