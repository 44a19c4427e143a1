"""Protein chains out of a pipeline: what each depends on, what is refused, and files that other programs read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fewstep_pipelines import FlowMatchProteinScheduler, FlowMatchProteinSDEScheduler, write_chains
from fewstep_pipelines.pipeline_fewstep_protein_v1 import cif_text, pdb_text

from tests.pipelines.proteins import protein_pipeline

CLOSE = {"rtol": 0, "atol": 1e-5}  # sums in another order


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sde", (False, True))
def test_the_loop_is_that_of_the_scheduler_on_centred_states(sde):
    """x_1 = centred noise, u(x, tau = 1 - t), a step, centred again; the last step lands on the clean chain."""
    pipeline, noise = protein_pipeline(sde=sde), torch.randn(1, 12, 3, generator=_generator(1))
    made = pipeline(lengths=12, latents=noise, generator=_generator(2)).coords_nm
    scheduler = type(pipeline.scheduler)()
    scheduler.set_timesteps(4)
    random, mask = _generator(2), torch.ones(1, 12, dtype=torch.bool)
    x = (noise - noise.mean(1, keepdim=True)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        u = pipeline.transformer(x, (1 - t).reshape(1), mask)
        x = scheduler.step(u - u.mean(1, keepdim=True), t, x, generator=random).prev_sample
        x = x - x.mean(1, keepdim=True)
    assert torch.allclose(made, x, **CLOSE)
    assert x.std() > 0.01


@pytest.mark.parametrize("sde", (False, True))
def test_chains_are_centred_and_padding_stays_zero(sde):
    made = protein_pipeline(sde=sde)(lengths=[7, 12, 9], generator=_generator())
    assert made.mask.sum(1).tolist() == [7, 12, 9] and made.coords_nm.shape == (3, 12, 3)
    assert made.coords_nm[~made.mask].abs().max() == 0
    assert made.coords_nm.sum(1).abs().max() < 1e-5
    assert [x.shape for x in made.chains()] == [(7, 3), (12, 3), (9, 3)]


@pytest.mark.parametrize("sde", (False, True))
def test_a_padded_chain_is_the_same_chain_alone(sde):
    """Given the noise of its residues: what stands in the padding of a batch changes nothing."""
    pipeline, noise = protein_pipeline(sde=sde), torch.randn(2, 12, 3, generator=_generator())
    pipeline.scheduler.draw = lambda like, *_: noise[: len(like), : like.shape[1]]
    both, alone = pipeline(lengths=[7, 12]).coords_nm, pipeline(lengths=[7]).coords_nm
    assert torch.allclose(both[:1, :7], alone, **CLOSE)


@pytest.mark.parametrize("sde", (False, True))
def test_a_generator_a_chain_makes_it_independent_of_its_batch(sde):
    pipeline = protein_pipeline(sde=sde)
    made = pipeline(lengths=[20, 30, 20], generator=[_generator(i) for i in range(3)]).chains()
    alone = pipeline(lengths=20, generator=[_generator(0)]).chains()[0]
    turned = pipeline(lengths=[20, 45], generator=[_generator(2), _generator(7)]).chains()[0]
    assert torch.allclose(made[0], alone, rtol=0, atol=2e-3)
    assert torch.allclose(made[2], turned, rtol=0, atol=2e-3)
    assert (made[0] - made[2]).abs().max() > 1


def test_one_generator_repeats_a_batch_and_none_does_not():
    pipeline = protein_pipeline()
    first, again = (pipeline(lengths=[9, 12], generator=_generator(3)).coords_nm for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(pipeline(lengths=[9, 12]).coords_nm, pipeline(lengths=[9, 12]).coords_nm)


def test_one_length_is_repeated():
    pipeline = protein_pipeline()
    assert pipeline(9, batch_size=3).mask.sum(1).tolist() == [9, 9, 9]
    assert pipeline(np.array([9, 10])).mask.sum(1).tolist() == [9, 10]
    with pytest.raises(ValueError, match="batch_size=3 does not fit 2 lengths"):
        pipeline([9, 10], batch_size=3)


def test_noise_scale_and_levels_are_asked_of_one_run_alone():
    pipeline, noise = protein_pipeline(), torch.randn(1, 12, 3, generator=_generator())
    seen = []

    def made(**options):
        def keep(_pipeline, _step, t, tensors):
            seen.append((t.item(), tensors["clean"].clone()))

        seen.clear()
        told = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["clean"]}
        return pipeline(12, latents=noise, generator=_generator(), **told, **options).coords_nm

    cold, own = made(noise_scale=0.1), made()
    assert torch.equal(own, made(noise_scale=0.45)) and not torch.equal(own, cold)
    made(sigmas=[0.5, 0.25])
    assert [t for t, _ in seen] == [0.5, 0.25]
    made(num_inference_steps=2)
    assert [t for t, _ in seen] == pytest.approx([10**-0.15, 10**-2])
    assert pipeline.num_timesteps == 2
    assert torch.equal(made(), own) and torch.equal(seen[-1][1], own)  # ends on the last clean chain


def test_a_callback_may_change_the_state_and_stop():
    pipeline = protein_pipeline()
    steps = []

    def halt(pipe, i, _t, tensors):
        steps.append(i)
        pipe._interrupt = i == 1
        return {"latents": tensors["latents"] * 0 + i}

    made = pipeline(12, callback_on_step_end=halt).coords_nm
    assert steps == [0, 1] and torch.equal(made, torch.ones(1, 12, 3))
    with pytest.raises(ValueError, match="tensor_inputs"):
        pipeline(12, callback_on_step_end=halt, callback_on_step_end_tensor_inputs=["u"])


def test_guidance_moves_from_the_unknown_fold_towards_the_known_one():
    """u = u_0 + w (u_c - u_0): at w = 0 the unguided chain, at 1 that of the fold in one pass."""
    pipeline, noise = protein_pipeline(cath_classes=(3, 4, 5)), torch.randn(1, 12, 3, generator=_generator())
    told = {"latents": noise, "num_inference_steps": 1}
    fold = torch.tensor([[1, 2, 5]])
    free, tied = pipeline(12, **told).coords_nm, pipeline(12, cath=fold, **told).coords_nm
    assert not torch.allclose(free, tied, **CLOSE)
    assert torch.allclose(pipeline(12, cath=fold, guidance_scale=0.0, **told).coords_nm, free, **CLOSE)
    twice = pipeline(12, cath=fold, guidance_scale=2.0, **told).coords_nm
    assert torch.allclose(twice, free + 2 * (tied - free), **CLOSE)


def test_self_conditioning_tells_the_network_its_last_clean_chain():
    pipeline, told = protein_pipeline(), []
    pipeline.transformer.register_forward_pre_hook(
        lambda _m, _args, known: told.append(known.get("x_self")), with_kwargs=True
    )
    cleans = []
    pipeline(
        12,
        self_conditioning=True,
        callback_on_step_end=lambda _p, _i, _t, tensors: cleans.append(tensors["clean"]),
        callback_on_step_end_tensor_inputs=["clean"],
    )
    assert told[0] is None and all(torch.equal(a, b) for a, b in zip(told[1:], cleans))
    with pytest.raises(ValueError, match="leave self_conditioning off"):
        protein_pipeline(self_conditioning=False)(12, self_conditioning=True)


def test_what_does_not_fit_is_refused_in_a_line():
    pipeline = protein_pipeline(cath_classes=(3, 4, 5))
    fold = torch.tensor([[1, 2, 5]])
    for wrong, said in (
        ({"lengths": 0}, r"lengths=\[0\]: this model makes chains of 1 residues or more"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [5, -1]}, r"lengths=\[-1\]"),
        ({"guidance_scale": 2.0}, "needs fold labels"),
        ({"cath": fold[0]}, "cath has shape"),
        ({"cath": fold + 1}, "labels beyond"),
        ({"generator": [_generator(), _generator()]}, "2 generators do not fit 1 chains"),
        ({"latents": torch.zeros(1, 7, 3)}, "latents have shape"),
        ({"num_inference_steps": 0}, "whole number from 1"),
        ({"noise_scale": -1.0}, "noise_scale"),
        ({"output_type": "pil"}, "write 'pt' or 'np'"),
    ):
        with pytest.raises(ValueError, match=said):
            pipeline(**{"lengths": 12, **wrong})
    with pytest.raises(ValueError, match="knows no fold classes"):
        protein_pipeline()(12, cath=fold)


def test_lengths_are_held_to_what_the_network_says():
    pipeline = protein_pipeline()
    pipeline.transformer.register_to_config(shortest=10, longest=20)
    assert pipeline([10, 20]).mask.sum(1).tolist() == [10, 20]
    for lengths in (9, 21, [15, 9, 9]):
        with pytest.raises(ValueError, match=r"lengths=\[(9|21)\]: this model makes chains of 10 to 20 residues"):
            pipeline(lengths)


def test_output_is_tensors_arrays_or_a_tuple_in_nanometres_and_angstrom():
    pipeline, noise = protein_pipeline(), torch.randn(2, 9, 3, generator=_generator())
    told = {"lengths": [7, 9], "latents": noise}
    made = pipeline(generator=_generator(), **told)
    arrays = pipeline(generator=_generator(), output_type="np", **told)
    coords, mask = pipeline(generator=_generator(), return_dict=False, **told)
    assert torch.equal(coords, made.coords_nm) and torch.equal(mask, made.mask)
    assert np.array_equal(arrays.coords_nm, made.coords_nm.numpy())
    assert torch.equal(made.coords_angstrom, 10 * made.coords_nm)
    assert np.array_equal(arrays.chains()[0], made.chains()[0].numpy())
    assert torch.equal(made.chains()[0], 10 * made.coords_nm[0, :7])


def test_a_network_in_half_precision_steps_in_float32():
    pipeline = protein_pipeline().to(torch.bfloat16)
    made = pipeline(12, generator=_generator())
    assert made.coords_nm.dtype == torch.float32
    exact = protein_pipeline()(12, generator=_generator())
    assert (made.coords_nm - exact.coords_nm).norm() < 0.2 * exact.coords_nm.norm()


@pytest.mark.parametrize("sde", (False, True))
def test_schedulers_are_swapped_by_from_config(sde):
    pipeline = protein_pipeline(sde=sde)
    other = FlowMatchProteinScheduler if sde else FlowMatchProteinSDEScheduler
    pipeline.scheduler = other.from_config(pipeline.scheduler.config, noise_scale=1.0)
    swapped = pipeline(12, generator=_generator()).coords_nm
    assert torch.equal(swapped, protein_pipeline(sde=not sde)(12, noise_scale=1.0, generator=_generator()).coords_nm)


# Files


def _chain(residues, spread=20.0, seed=0):
    return spread * np.random.default_rng(seed).standard_normal((residues, 3)).astype(np.float32)


def _biotite(file):
    structure_io = pytest.importorskip("biotite.structure.io")
    return structure_io.load_structure(str(file))


def _gemmi(file):
    gemmi = pytest.importorskip("gemmi")
    return gemmi.read_structure(str(file))


@pytest.mark.parametrize("file_format", ("pdb", "cif"))
@pytest.mark.parametrize("residues", (1, 60, 1234, 9999))
def test_biotite_reads_back_what_is_written(residues, file_format, tmp_path):
    chain = _chain(residues)
    (file,) = write_chains([chain], tmp_path, file_format)
    atoms = _biotite(file)
    assert np.abs(atoms.coord - chain).max() <= 0.00051
    assert atoms.res_id.tolist() == list(range(1, residues + 1))
    assert {(a, r, e, c) for a, r, e, c in zip(atoms.atom_name, atoms.res_name, atoms.element, atoms.chain_id)} == {
        ("CA", "ALA", "C", "A")
    }
    assert not atoms.hetero.any()


@pytest.mark.parametrize("file_format", ("pdb", "cif"))
def test_gemmi_reads_back_what_is_written(file_format, tmp_path):
    chain = _chain(1234)
    (file,) = write_chains([chain], tmp_path, file_format)
    structure = _gemmi(file)
    (model,) = structure
    (read,) = model
    assert len(read.get_polymer()) == 1234 and read.name == "A"
    assert np.abs(np.array([residue[0].pos.tolist() for residue in read]) - chain).max() <= 0.00051
    assert {(residue.name, residue[0].name, residue[0].element.name) for residue in read} == {("ALA", "CA", "C")}


def test_a_pdb_line_has_its_columns():
    """wwPDB format 3.30, ATOM: 7-11 serial, 13-16 name, 18-20 residue, 22 chain, 23-26 number, 31-54 place, 77-78 element."""
    chain = np.zeros((1000, 3), np.float32)
    chain[-1] = [-123.456, 9999.999, 0.0004]
    lines = pdb_text(chain).splitlines()
    assert {len(line) for line in lines[:1000]} == {80}
    line = lines[999]
    found = [line[a:b] for a, b in ((0, 6), (6, 11), (12, 16), (16, 20), (21, 22), (22, 26), (26, 30))]
    assert found == ["ATOM  ", " 1000", " CA ", " ALA", "A", "1000", "    "]
    assert [line[a:b] for a, b in ((30, 38), (38, 46), (46, 54))] == ["-123.456", "9999.999", "   0.000"]
    assert [line[a:b] for a, b in ((54, 60), (60, 66), (76, 78))] == ["  1.00", "  0.00", " C"]
    assert lines[1000:] == ["TER    1001      ALA A1000", "END"]


def test_a_pdb_refuses_what_its_columns_cannot_hold_and_a_cif_holds_it(tmp_path):
    for chain, said in (
        (np.full((3, 3), -1000.0), "a coordinate of -1000 Angstrom"),
        (np.full((3, 3), 10000.0), "a coordinate of 10000 Angstrom"),
        (np.full((3, 3), 9999.9996), "a coordinate of 10000 Angstrom"),
        (np.zeros((10000, 3)), "10000 residues"),
    ):
        with pytest.raises(ValueError, match=f"cannot hold {said}: write 'cif'"):
            write_chains([_chain(5), chain], tmp_path / "none")
        (file,) = write_chains([chain], tmp_path, "cif")
        assert np.abs(_biotite(file).coord - chain).max() <= 0.0011  # biotite reads float32
    assert not (tmp_path / "none").exists()  # all or nothing


@pytest.mark.parametrize("text", (pdb_text, cif_text))
def test_coordinates_that_are_no_numbers_are_refused(text):
    for bad in (np.nan, np.inf):
        chain = _chain(5)
        chain[2, 1] = bad
        with pytest.raises(ValueError, match="chain broken has coordinates that are no numbers"):
            text(chain, "broken")


def test_an_output_saves_its_chains_without_padding_counted_from_a_number(tmp_path):
    made = protein_pipeline()(lengths=[7, 9], generator=_generator())
    files = made.save(tmp_path / "a" / "b", first=5)
    assert [file.name for file in files] == ["000005.pdb", "000006.pdb"]
    for file, chain in zip(files, made.chains()):
        assert np.abs(_biotite(file).coord - chain.numpy()).max() <= 0.00051
    assert [file.suffix for file in made.save(tmp_path, "cif")] == [".cif", ".cif"]
    with pytest.raises(ValueError, match="write 'pdb' or 'cif'"):
        made.save(tmp_path, "mmtf")
