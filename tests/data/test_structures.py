"""PDB and mmCIF files: what is read of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gemmi
import numpy as np
import pytest
from biotite.structure import Atom as A
from biotite.structure import AtomArray, array
from biotite.structure.io.pdb import PDBFile
from biotite.structure.io.pdbx import CIFFile, set_structure

from fewstep.data.chains import Chains, shipped
from fewstep.data.structures import list_structures, read_chains
from fewstep.errors import UserError


def atoms(x: np.ndarray, chain: str = "A", residue: str = "ALA", hetero: bool = False, name: str = "CA") -> list[A]:
    """One atom a residue at x [residues, 3] Angstrom."""
    said = {"chain_id": chain, "res_name": residue, "atom_name": name, "element": name[0], "hetero": hetero}
    return [A(position, res_id=i + 1, **said) for i, position in enumerate(x)]


def walk(n: int) -> np.ndarray:
    """A real chain's first residues, rounded as files round them."""
    return np.round(next(chain.x[:n] for chain in shipped() if len(chain.x) >= n), 3)


def write(file: Path, made: list[A]) -> Path:
    """By biotite, in the format of the ending."""
    structure: AtomArray = array(made)
    if file.suffix == ".cif":
        cif = CIFFile()
        set_structure(cif, structure, data_block="X")
        cif.write(str(file))
    else:
        pdb = PDBFile()
        pdb.set_structure(structure)
        pdb.write(str(file))
    return file


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_a_chain_comes_back_as_it_was_written(tmp_path, suffix):
    """To the digits of the format, with file and chain in its name."""
    x = walk(60)
    (chain,) = read_chains(write(tmp_path / f"one{suffix}", atoms(x)))
    assert chain.name == "one_A" and len(chain.breaks) == 0
    np.testing.assert_allclose(chain.x, x, atol=1e-3)


def test_files_of_gemmi_are_read_alike(tmp_path):
    """mmCIF by another writer."""
    x = walk(40)
    structure = gemmi.read_structure(str(write(tmp_path / "one.pdb", atoms(x))))
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "two.cif"))
    np.testing.assert_allclose(read_chains(tmp_path / "two.cif")[0].x, x, atol=1e-3)


def test_only_amino_acids_are_read_and_each_chain_of_them(tmp_path):
    """Water, DNA and ions are left out; selenomethionine, which files call a heteroatom, is one of the chain."""
    x = walk(30)
    made = atoms(x[:10], "A") + atoms(x[10:20], "B")
    made += [A(x[20], chain_id="B", res_id=11, res_name="MSE", atom_name="CA", element="C", hetero=True)]
    made += atoms(x[21:24], "W", "HOH", True, "O") + atoms(x[24:27], "D", "DA", False, "P")
    made += [A(x[28], chain_id="A", res_id=90, res_name="CA", atom_name="CA", element="CA", hetero=True)]
    assert [(c.name, len(c.x)) for c in read_chains(write(tmp_path / "f.pdb", made))] == [("f_A", 10), ("f_B", 11)]


def test_of_alternative_places_the_first_counts(tmp_path):
    """One CA a residue."""
    text = "\n".join(
        f"ATOM  {i:5d}  CA {alternative}ALA A{residue:4d}    {3.8 * residue:8.3f}{y:8.3f}{0:8.3f}  0.50  0.00           C  "
        for i, (residue, alternative, y) in enumerate([(1, " ", 0), (2, "A", 1), (2, "B", 2), (3, " ", 0)], 1)
    )
    (tmp_path / "alt.pdb").write_text(text + "\nEND\n")
    (chain,) = read_chains(tmp_path / "alt.pdb")
    assert len(chain.x) == 3 and chain.x[1, 1] == 1


def test_chains_with_the_same_coordinates_count_once(tmp_path):
    """The first of them."""
    x = walk(30)
    made = atoms(x, "A") + atoms(x[::-1], "B") + atoms(x, "C")
    assert [c.name for c in read_chains(write(tmp_path / "one.cif", made))] == ["one_A", "one_B"]


def test_a_gap_makes_two_pieces(tmp_path):
    """Where CA are further apart than a bond."""
    x = walk(30)
    x[12:] += np.array([9.0, 0, 0], np.float32)
    (chain,) = read_chains(write(tmp_path / "gap.pdb", atoms(x)))
    assert chain.breaks.tolist() == [11]
    assert [(p.name, len(p.x)) for p in chain.pieces()] == [("gap_A.0", 12), ("gap_A.1", 18)]


def test_a_file_without_protein_is_refused(tmp_path):
    """By name."""
    file = write(tmp_path / "water.pdb", atoms(walk(5), residue="HOH", hetero=True, name="O"))
    with pytest.raises(UserError, match=r"water.pdb' holds no protein"):
        read_chains(file)


@pytest.mark.parametrize(("name", "text"), [("bad.pdb", "hello\n"), ("bad.cif", "not a cif"), ("bad.bcif", "x")])
def test_a_file_that_is_no_structure_is_refused_in_one_line(tmp_path, name, text):
    """Whatever the parser says."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name) as caught:
        read_chains(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_coordinates_that_are_not_numbers_are_refused(tmp_path):
    """With what to do about them."""
    x = walk(8)
    x[3, 1] = np.nan
    file = write(tmp_path / "nan.cif", atoms(x))
    with pytest.raises(UserError, match=r"nan.cif' (has CA coordinates that are not numbers|is no readable)"):
        read_chains(file)


def test_a_folder_without_structures_says_which_endings_count(tmp_path):
    """And one that is not there."""
    with pytest.raises(UserError, match=r"\.pdb"):
        list_structures(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        Chains(path=str(tmp_path / "absent"))


def test_files_that_cannot_be_used_are_left_out_with_a_warning(tmp_path):
    """The others serve; a folder of nothing else is refused with the first reason."""
    write(tmp_path / "good.pdb", atoms(walk(60)))
    (tmp_path / "bad.pdb").write_text("hello\n")
    with pytest.warns(UserWarning, match=r"1 of 2 files.*bad.pdb"):
        source = Chains(path=str(tmp_path), shortest=50, longest=64)
    assert len(source) == 1
    (tmp_path / "good.pdb").unlink()
    with pytest.raises(UserError, match=r"bad.pdb"):
        Chains(path=str(tmp_path))
