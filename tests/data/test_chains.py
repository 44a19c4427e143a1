"""Chains as rows: units, crops, rotations, padding, and lengths alone."""

from __future__ import annotations

import pytest
import torch

from fewstep.data.chains import Chains, Lengths, padded, rotations
from fewstep.draws import Draw
from fewstep.errors import UserError


def draw(rows: int, step: int = 0) -> Draw:
    """The numbers of a step."""
    return Draw(0, step, range(rows))


def test_rows_are_centred_nanometres_with_zero_padding():
    """Bonds of .38; the mask counts residues."""
    rows = Chains(shortest=40, longest=60).fetch(torch.arange(64), draw(64))
    x, mask = rows["x0"], rows["cond"]["mask"]
    assert x.shape == (64, 64, 3) and not x[~mask].any()
    assert (x.sum(1) / mask.sum(1, keepdim=True)).abs().max() < 1e-6
    both = mask[:, 1:] & mask[:, :-1]
    assert x.diff(dim=1).norm(dim=2)[both].mean().item() == pytest.approx(0.38, abs=0.002)
    assert mask.sum(1).min() >= 40 and mask.sum(1).max() <= 60


def test_long_chains_are_cropped_to_unbroken_pieces_anywhere():
    """Two steps see other parts of a chain; without a draw it is the first part."""
    source = Chains(shortest=64, longest=64)
    ids = torch.tensor([i for i, chain in enumerate(source.chains) if len(chain.x) > 100][:32])
    one, two, plain = (source.fetch(ids, d)["x0"] for d in (draw(32), draw(32, 1), None))
    apart = [torch.cdist(x, x) for x in (one, two)]
    assert (apart[0] - apart[1]).flatten(1).abs().amax(1).gt(0.1).float().mean() > 0.9
    assert one.diff(dim=1).norm(dim=2).max() < 0.42
    first = torch.from_numpy(source.chains[int(ids[0])].x[:64]) / 10
    torch.testing.assert_close(plain[0], first - first.mean(0))


def test_whole_leaves_long_chains_out():
    """And none in range is an error that names the bounds."""
    assert max(len(c.x) for c in Chains(shortest=40, longest=64, whole=True).chains) <= 64
    with pytest.raises(UserError, match="change shortest"):
        Chains(shortest=5000, longest=6000)


def test_rotations_are_proper_and_uniform():
    """R R' = 1, det R = 1; over many draws each entry has mean 0 and variance 1/3."""
    turned = rotations(torch.randn(40_000, 4, generator=torch.Generator().manual_seed(0)))
    eye = torch.eye(3).expand_as(turned)
    torch.testing.assert_close(turned @ turned.transpose(1, 2), eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(len(turned)), atol=1e-5, rtol=0)
    assert turned.mean(0).abs().max() < 0.015 and (turned.var(0) - 1 / 3).abs().max() < 0.01


LABELS = "name,cath\n{0},3.40.50\n{1},1.10.8.10\n{2},3.40\n"


def labelled(tmp_path, names=None, **more):
    """Shipped chains, three of them with folds."""
    chains = [c.name for c in Chains(shortest=60, longest=64).chains]
    (tmp_path / "cath.csv").write_text(LABELS.format(*(names or chains)))
    return Chains(shortest=60, longest=64, labels=str(tmp_path / "cath.csv"), **more)


def test_folds_are_counted_from_one_by_level_and_what_is_not_known_is_zero(tmp_path):
    """In the order of their numbers; what follows the topology is not read."""
    source = labelled(tmp_path)
    assert source.folds.codes == ("1.10.8", "3.40", "3.40.50") and source.folds.classes == (2, 2, 2)
    rows = source.fetch(torch.tensor([2, 0, 1, 5]), draw(4))["cond"]["cath"]
    assert rows.tolist() == [[2, 2, 0], [2, 2, 2], [1, 1, 1], [0, 0, 0]]
    assert source.content_key() != Chains(shortest=60, longest=64).content_key()
    file = tmp_path / "folds.txt"
    file.write_text("1.10.8 2.60.40 3.40.50 10.1.1")
    wider = labelled(tmp_path, folds=str(file))
    assert wider.folds.classes == (4, 4, 4), "10 comes after 3"
    assert wider.fetch(torch.tensor([0]), None)["cond"]["cath"].tolist() == [[3, 3, 3]]


def test_a_file_names_all_its_chains_and_pieces(tmp_path):
    """By the file's name or the chain's."""
    name = Chains(shortest=60, longest=64).chains[0].name
    source = labelled(tmp_path, [name.rsplit("_", 1)[0], "none", "none2"])
    assert source.fetch(torch.tensor([0]), None)["cond"]["cath"].any()
    with pytest.raises(UserError, match="names none of the chains"):
        labelled(tmp_path, ["a", "b", "c"])


def test_tables_of_folds_say_what_is_wrong_with_them(tmp_path):
    """File, line and mend."""
    file = tmp_path / "t.csv"
    for text, said in (
        ("name,fold\na,3\n", "has the columns name, fold: write name,cath"),
        ("name,cath\n", "no rows below its head"),
        ("name,cath\na,3\nb,alpha\n", "line 3 .*'alpha' is no CATH code"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            Chains(labels=str(file))
    with pytest.raises(UserError, match=r"cannot read 'none\.csv'"):
        Chains(labels="none.csv")
    file.write_text("1.10.8 alpha")
    with pytest.raises(UserError, match="'alpha' is no CATH code"):
        labelled(tmp_path, folds=str(file))
    file.write_text("1.10.8")
    with pytest.raises(UserError, match=r"fold 3\.40\.50 is not among the 1"):
        labelled(tmp_path, folds=str(file))


def test_lengths_and_folds_are_drawn_in_turn_from_a_table(tmp_path):
    """Of its rows within the bounds, counted as the teacher counts."""
    (tmp_path / "p.csv").write_text("length,cath\n60,3.40.50\n300,1.10.8\n72,\n")
    (tmp_path / "folds.txt").write_text("1.10.8\n2.60.40\n3.40.50\n")
    source = Lengths(pairs=str(tmp_path / "p.csv"), folds=str(tmp_path / "folds.txt"), count=9)
    rows = source.fetch(torch.arange(4), None)["cond"]
    assert rows["mask"].sum(1).tolist() == [60, 72, 60, 72] and rows["mask"].shape == (4, 72)
    assert rows["cath"].tolist() == [[3, 3, 3], [0, 0, 0]] * 2 and source.folds.classes == (3, 3, 3)
    with pytest.raises(UserError, match="no length of 5 to 20"):
        Lengths(pairs=str(tmp_path / "p.csv"), shortest=5, longest=20)
    (tmp_path / "p.csv").write_text("length,cath\nlong,3\n")
    with pytest.raises(UserError, match="has the length 'long'"):
        Lengths(pairs=str(tmp_path / "p.csv"))


def test_batches_are_padded_to_their_longest_and_buckets_part_lengths(tmp_path):
    """A row's numbers do not depend on the padding."""
    source = Chains(shortest=40, longest=128, bucket=32)
    sizes = torch.tensor([len(c.x) for c in source.chains])
    assert source.buckets.tolist() == [-(-min(n, 128) // 32) for n in sizes.tolist()]
    short, long = int(sizes.argmin()), int(sizes.argmax())
    alone = source.fetch(torch.tensor([short]), draw(1))
    beside = source.fetch(torch.tensor([short, long]), draw(2))
    width = padded(int(sizes[short]))
    assert alone["x0"].shape == (1, width, 3) and beside["x0"].shape == (2, padded(min(int(sizes[long]), 128)), 3)
    assert torch.equal(beside["x0"][:1, :width], alone["x0"]) and not beside["x0"][0, width:].any()
    assert torch.equal(draw(2).normal("a", 12, 3)[:, :8], draw(2).normal("a", 8, 3))
    assert Lengths(shortest=40, longest=64, bucket=16).buckets.unique().tolist() == [3, 4]
    heaviest = source.fetch(source.heaviest(3), None)["cond"]["mask"].sum(1)
    assert heaviest.min() == heaviest.max() == min(int(sizes[long]), 128)


def test_a_row_depends_on_its_slot_and_chain_alone():
    """Whatever batch it is in."""
    source = Chains(shortest=60, longest=64)
    all_rows = source.fetch(torch.arange(8), draw(8))["x0"]
    later = source.fetch(torch.arange(4, 8), Draw(0, 0, range(4, 8)))["x0"]
    assert torch.equal(all_rows[4:], later)


def test_lengths_are_every_length_of_the_range_equally_often():
    """Masks alone, padded to one length."""
    source = Lengths(shortest=50, longest=59)
    cond = source.fetch(torch.arange(1000), None)["cond"]
    assert set(cond) == {"mask"} and cond["mask"].shape == (1000, 64)
    assert cond["mask"].sum(1).bincount()[50:60].tolist() == [100] * 10


@pytest.mark.parametrize("source", [Lengths, Chains])
def test_bounds_out_of_order_or_range_are_refused(source):
    """By name."""
    with pytest.raises(UserError, match="shortest"):
        source(shortest=80, longest=70)
    with pytest.raises(UserError, match="shortest"):
        source(shortest=2, longest=70)


def test_padded_lengths_are_multiples_of_eight():
    """The next one."""
    assert [padded(n) for n in (1, 8, 9, 64)] == [8, 8, 16, 64]
