"""Chains of a protein folder: each is a function of the seed and its own index."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.errors import UserError
from fewstep.exporting.chains import generate_chains, save_chains, usual_length
from fewstep.exporting.pipeline import load_pipeline
from tests.exporting.protein_students import protein_student, protein_teacher
from tests.exporting.students import student


@pytest.fixture(scope="module")
def toy():
    return protein_student()


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    return toy.export(tmp_path_factory.mktemp("protein") / "m")


def _close(chains, others):
    return all(a.shape == b.shape and np.abs(a - b).max() < 1e-3 for a, b in zip(chains, others, strict=True))


def test_chain_i_is_that_of_noise_i_whatever_its_batch_and_padding(folder):
    made = generate_chains(folder, 7, seed=3, lengths=(12, 30, 20))
    assert made.lengths == [12, 30, 20, 12, 30, 20, 12]
    assert [x.shape for x in made.chains] == [(n, 3) for n in made.lengths]
    assert {x.dtype for x in made.chains} == {np.dtype("float32")}
    for batch in (1, 2, 3):
        assert _close(generate_chains(folder, 7, seed=3, lengths=(12, 30, 20), batch=batch).chains, made.chains)
    assert _close(generate_chains(folder, 2, seed=3, lengths=(12, 30)).chains, made.chains[:2])  # other padding
    assert not _close(generate_chains(folder, 7, seed=4, lengths=(12, 30, 20)).chains, made.chains)
    assert not _close(made.chains[:1], made.chains[3:4])


def test_chains_are_those_of_the_students_own_sampler_in_angstrom(toy, folder):
    lengths = [12, 30, 20]
    ours = 10 * toy.chains(lengths, seed=5).numpy()
    made = generate_chains(folder, 3, seed=5, lengths=lengths)
    assert _close(made.chains, [x[:n] for x, n in zip(ours, lengths)])


def test_a_teachers_chains_are_those_of_its_own_sampler(tmp_path):
    teacher = protein_teacher(steps=20, renewal=0.5)
    folder = teacher.export(tmp_path / "m")
    ours = 10 * teacher.chains([12, 20], seed=5).numpy()
    made = generate_chains(folder, 2, seed=5, lengths=[12, 20])
    assert made.scheduler == "FlowMatchProteinSDEScheduler" and made.nfe == 20
    assert _close(made.chains, [x[: len(own)] for x, own in zip(ours, made.chains)])


def test_calls_levels_and_scales_are_told(folder):
    made = generate_chains(folder, 3, lengths=(12, 20))
    assert (made.nfe, made.scheduler, made.noise_scale) == (4, "FlowMatchProteinScheduler", 0.45)
    assert made.timesteps == pytest.approx([10**-0.15, 0.1718, 0.0412, 0.01], abs=1e-4)
    assert made.ms_per_chain > 0
    other = generate_chains(folder, 3, lengths=(12, 20), steps=2, noise_scale=1.0)
    assert (other.nfe, other.noise_scale, len(other.timesteps)) == (2, 1.0, 2)
    assert generate_chains(folder, 3, lengths=(12, 20)).noise_scale == 0.45


def test_progress_is_told_after_each_batch(folder):
    told = []
    generate_chains(folder, 5, lengths=(12,), batch=2, progress=lambda *counts: told.append(counts))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_folds_guide_a_network_that_knows_them(tmp_path):
    folder = protein_student(cath_classes=(3, 4, 5)).export(tmp_path / "m")
    said = {"lengths": (12,), "steps": 1}
    free = generate_chains(folder, 2, **said).chains
    tied = generate_chains(folder, 2, cath=[1, 2, 5], **said)
    assert tied.nfe == 1 and not _close(free, tied.chains)
    assert _close(generate_chains(folder, 2, cath=[[1, 2, 5]] * 2, **said).chains, tied.chains)
    twice = generate_chains(folder, 2, cath=[1, 2, 5], guidance=2.0, **said)
    assert twice.nfe == 2
    assert _close(twice.chains, [2 * c - f for c, f in zip(tied.chains, free)])
    with pytest.raises(UserError, match="three labels"):
        generate_chains(folder, 2, cath=[1, 2], **said)


def test_what_does_not_fit_is_an_error_of_one_line(folder, tmp_path):
    for options, said in (
        ({"n": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"lengths": ()}, "no lengths"),
        ({"lengths": (0,)}, r"lengths=\[0\]"),
        ({"steps": 1000}, "the grid has 371 levels"),
        ({"noise_scale": -1.0}, "noise_scale=-1"),
        ({"guidance": 2.0}, "needs fold labels"),
        ({"cath": [1, 1, 1]}, "knows no fold classes"),
    ):
        with pytest.raises(UserError, match=said):
            generate_chains(folder, **{"n": 2, "lengths": (12,), **options})
    with pytest.raises(UserError, match="makes images"):
        generate_chains(student().export(tmp_path / "images"), 1)


def test_chains_are_saved_in_order_and_broken_ones_are_refused(folder, tmp_path):
    made = generate_chains(folder, 3, lengths=(12, 20))
    files = save_chains(made, tmp_path / "out")
    assert [file.name for file in files] == ["000000.pdb", "000001.pdb", "000002.pdb"]
    assert [file.read_text().count("ATOM  ") for file in files] == [12, 20, 12]
    with pytest.raises(UserError, match="write 'pdb' or 'cif'"):
        save_chains(made, tmp_path / "out", "xyz")
    with pytest.raises(UserError, match="cannot write into"):
        save_chains(made, files[0])
    made.chains[1][3] = np.nan
    with pytest.raises(UserError, match="000001 has coordinates that are no numbers"):
        save_chains(made, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize(
    ("limits", "usual"), (((None, None), 100), ((40, 64), 64), ((120, 200), 120), ((50, 256), 100))
)
def test_the_usual_length_is_100_or_the_nearest(folder, limits, usual):
    pipeline = load_pipeline(folder)
    pipeline.transformer.register_to_config(shortest=limits[0], longest=limits[1])
    assert usual_length(pipeline) == usual
