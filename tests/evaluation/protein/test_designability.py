"""Designability with design and fold functions of known answers, and ESMFold's adapter on a tiny random network."""

from __future__ import annotations

import numpy as np
import pytest

from fewstep.data.chains import shipped
from fewstep.errors import UserError
from fewstep.evaluation.protein.designability import designability, self_consistency
from fewstep.evaluation.protein.esmfold import esmfold
from fewstep.evaluation.protein.similarity import rmsd

from .chains import mirrored, turned

CHAINS = [c.x.astype(float) for c in shipped()[:3]]


class World:
    """Designs names `INDEX:NUMBER` of chains; folds number k to the chain itself, off by k Angstrom, and turned."""

    def __init__(self, off: float = 0.0):
        self.off, self.chains, self.asked = off, [], []

    def design(self, x, sequences, temperature):
        self.asked.append((sequences, temperature))
        self.chains.append(x)
        return [f"{len(self.chains) - 1}:{k}" for k in reversed(range(sequences))]

    def fold(self, sequence):
        index, k = map(int, sequence.split(":"))
        x = self.chains[index]
        return turned(displaced(x, self.off + k), seed=k)


def displaced(x, by: float):
    """x with noise that no rotation or translation undoes, of root mean square `by` after superposition."""
    noise = np.random.default_rng(1).normal(size=x.shape)
    low, high = 0.0, 10.0
    for _ in range(60):  # the size of the noise at which the RMSD is `by`
        middle = (low + high) / 2
        low, high = (middle, high) if rmsd(x, x + middle * noise) < by else (low, middle)
    return x + low * noise


def test_a_fold_function_that_gives_the_chain_back_has_no_distance():
    world = World()
    found = designability(CHAINS, world.design, world.fold)
    assert found.share == 1 and max(d.rmsd for d in found.best) < 1e-6
    assert [d.sequence for d in found.best] == ["0:0", "1:0", "2:0"]  # the best of eight
    assert world.asked == [(8, 0.1)] * 3


@pytest.mark.parametrize("off, share", [(1.95, 1.0), (2.05, 0.0)])
def test_two_angstrom_is_the_border(off, share):
    world = World(off)
    found = designability(CHAINS, world.design, world.fold, sequences=2)
    assert found.share == share
    assert [d.rmsd for d in found.best] == pytest.approx([off] * 3, abs=1e-6)


def test_the_mirror_image_is_no_success():
    assert self_consistency(CHAINS[0], lambda x, k, t: ["M"] * k, lambda s: mirrored(CHAINS[0])).rmsd > 5


def test_a_chain_that_is_not_finite_is_not_designable():
    hurt = CHAINS[0].copy()
    hurt[0, 0] = np.nan
    world = World()
    assert designability([hurt, CHAINS[1]], world.design, world.fold).share == 0.5
    assert np.isnan(designability([], world.design, world.fold).share)


def test_functions_that_answer_something_else_are_named():
    world = World()
    with pytest.raises(UserError, match="gave 1 sequences, not 8"):
        designability(CHAINS, lambda x, k, t: ["M"], world.fold)
    with pytest.raises(UserError, match=r"gave coordinates \(2, 3\)"):
        designability(CHAINS, world.design, lambda s: np.zeros((2, 3)))


def test_rmsd_of_a_stretched_chain():
    """Points scaled by 1 + a about their centre are a times the radius of gyration away."""
    x = CHAINS[0] - CHAINS[0].mean(0)
    assert rmsd(x, turned(1.1 * x)) == pytest.approx(0.1 * np.sqrt((x**2).sum(1).mean()))


def test_esmfold_gives_the_ca_atoms_of_its_last_block(tmp_path):
    """A random network of the released classes: what the adapter gives is what the model itself writes as a PDB file."""
    model = tiny_esmfold()
    model.save_pretrained(tmp_path)
    x = esmfold(tmp_path, device="cpu")("ACDEFGHIKL")
    lines = [line for line in model.infer_pdb("ACDEFGHIKL").splitlines() if line[12:16] == " CA "]
    written = [[float(line[i : i + 8]) for i in (30, 38, 46)] for line in lines]
    assert x.shape == (10, 3)
    assert x == pytest.approx(np.array(written), abs=6e-4)


def test_esmfold_wants_a_local_folder_without_pickles(tmp_path):
    with pytest.raises(UserError, match="no ESMFold folder"):
        esmfold("facebook/esmfold_v1")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        esmfold(tmp_path)


def tiny_esmfold():
    from transformers import EsmConfig, EsmForProteinFolding

    structure = {
        "sequence_dim": 32,
        "pairwise_dim": 16,
        "ipa_dim": 4,
        "resnet_dim": 16,
        "num_heads_ipa": 2,
        "num_qk_points": 2,
        "num_v_points": 2,
        "num_blocks": 2,
        "num_resnet_blocks": 1,
    }
    trunk = {
        "num_blocks": 1,
        "sequence_state_dim": 32,
        "pairwise_state_dim": 16,
        "sequence_head_width": 16,
        "pairwise_head_width": 8,
        "position_bins": 4,
        "max_recycles": 1,
        "structure_module": structure,
    }
    config = EsmConfig(
        vocab_size=33,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        pad_token_id=1,
        mask_token_id=32,
        position_embedding_type="rotary",
        max_position_embeddings=64,
        is_folding_model=True,
        esmfold_config={"trunk": trunk, "lddt_head_hid_dim": 8, "fp16_esm": False},
        vocab_list=["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"],
    )
    return EsmForProteinFolding(config).eval()
