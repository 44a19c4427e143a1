"""Two runs prompt by prompt, and never across protocols."""

import json
import shutil

import pytest
import torch

from fewstep.evaluation.bootstrap import mean_interval
from fewstep.evaluation.manifest import Protocol, Score, write_scores

from .benchmark import said

PROTOCOL = Protocol("hpsv2", 40, "fewstep", "1 + 1", "hpsv2", "ab", "own", "prompts sha256=cd")
FACTS = {"protocol": "tiny", "n": 40, "per_prompt": 1, "prompts_sha256": "cd", "size": None, "resize": None, "seed": 0}


def _run(folder, values, facts=None, **fields):
    """A folder as `evaluate --out` leaves it."""
    folder.mkdir()
    whole = Protocol(**{**PROTOCOL.__dict__, **fields})
    fid = Protocol(**{**whole.__dict__, "metric": "fid", "features": "inception"})
    write_scores([Score(values.mean().item(), whole, (0.0, 1.0)), Score(3.0, fid)], folder / "metrics.json")
    rows = [json.dumps({"index": i, whole.metric: x}) for i, x in enumerate(values.tolist())]
    (folder / "values.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "protocol.json").write_text(json.dumps({**FACTS, **(facts or {})}))
    return folder


def _values(seed, n=40):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _compared(capsys, a, b):
    code, out, err = said(capsys, "compare", a, b, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_small_shift_shows_in_pairs_that_differ_far_more_among_themselves(tmp_path, capsys):
    """Prompts spread by 1, the shift is .1: alone each mean is known to .3, the difference of pairs to .006."""
    base, noise = _values(0), 0.02 * _values(1)
    a, b = _run(tmp_path / "a", base), _run(tmp_path / "b", base + 0.1 + noise)
    row = _compared(capsys, a, b)["rows"][0]
    want = mean_interval(0.1 + noise)
    assert row["difference"] == pytest.approx(want.mean)
    assert (row["low"], row["high"]) == pytest.approx((want.low, want.high))
    assert 0.08 < row["low"] < row["high"] < 0.12
    assert (row["wins"], row["losses"], row["ties"]) == (40, 0, 0)
    assert row["p"] == pytest.approx(2 / 2**40)


def test_a_run_against_itself_is_all_ties_and_the_other_way_round_changes_the_sign(tmp_path, capsys):
    a, b = _run(tmp_path / "a", _values(0)), _run(tmp_path / "b", _values(2))
    same = _compared(capsys, a, a)["rows"][0]
    assert (same["difference"], same["low"], same["high"], same["ties"], same["p"]) == (0, 0, 0, 40, 1)
    there, back = (_compared(capsys, *pair)["rows"][0] for pair in ((a, b), (b, a)))
    assert there["difference"] == -back["difference"]
    assert (there["wins"], there["p"]) == (back["losses"], back["p"])


def test_a_distance_of_sets_has_a_difference_and_no_pairs(tmp_path, capsys):
    a, b = _run(tmp_path / "a", _values(0)), _run(tmp_path / "b", _values(2))
    fid = _compared(capsys, a, b)["rows"][1]
    assert (fid["label"], fid["difference"]) == ("fid[inception]", 0) and "p" not in fid
    code, out, _ = said(capsys, "compare", a, b)
    assert code == 0 and "p (sign test)" in out and "hpsv2[hpsv2]" in out


def test_images_of_one_prompt_are_one_pair(tmp_path, capsys):
    facts = {"per_prompt": 4}
    a, b = _run(tmp_path / "a", _values(0), facts), _run(tmp_path / "b", _values(2), facts)
    row = _compared(capsys, a, b)["rows"][0]
    assert row["prompts"] == row["wins"] + row["losses"] == 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("protocol", "other"), ("n", 41), ("per_prompt", 2), ("prompts_sha256", "ee"), ("resize", "x"), ("seed", 1)],
)
def test_another_protocol_is_refused_by_the_field_that_differs(tmp_path, capsys, field, value):
    a, b = _run(tmp_path / "a", _values(0)), _run(tmp_path / "b", _values(0), {field: value})
    code, _, err = said(capsys, "compare", a, b)
    assert code == 2 and f"cannot be compared: {field} is '{FACTS[field]}' there and '{value}' here" in err


@pytest.mark.parametrize("field", ["weights_sha256", "features", "resize", "reference", "impl_version", "n"])
def test_values_read_with_another_instrument_are_refused_by_the_field(tmp_path, capsys, field):
    value = 7 if field == "n" else "other"
    a, b = _run(tmp_path / "a", _values(0)), _run(tmp_path / "b", _values(0), **{field: value})
    code, _, err = said(capsys, "compare", a, b)
    assert code == 2 and f"cannot be compared: {field} is" in err


def test_two_conventions_have_nothing_in_common(tmp_path, capsys):
    a, b = (_run(tmp_path / x, _values(0), metric=f"clip_score.{x}") for x in ("cosine", "percent"))
    for folder in (a, b):
        scores = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(scores[:1]))
    code, _, err = said(capsys, "compare", a, b)
    assert code == 2 and "has clip_score.cosine, " in err and "none in common" in err


def test_the_seed_of_images_from_elsewhere_is_not_held_against_them(tmp_path, capsys):
    a, b = _run(tmp_path / "a", _values(0)), _run(tmp_path / "b", _values(2))
    facts = {key: value for key, value in FACTS.items() if key != "seed"}
    (b / "protocol.json").write_text(json.dumps(facts))
    assert _compared(capsys, a, b)["n"] == 40


def test_folders_without_scores_and_damaged_ones_are_named(tmp_path, capsys):
    a, b = _run(tmp_path / "a", _values(0)), _run(tmp_path / "b", _values(2))
    (tmp_path / "c").mkdir()
    code, _, err = said(capsys, "compare", a, tmp_path / "c")
    assert code == 2 and "no metrics.json in" in err
    (b / "values.jsonl").write_text('{"index": 0, "hpsv2": 1}\n{"index')
    code, _, err = said(capsys, "compare", a, b)
    assert code == 2 and "values.jsonl' is damaged" in err
    shutil.copy(a / "values.jsonl", b / "values.jsonl")
    (b / "protocol.json").write_text("{")
    code, _, err = said(capsys, "compare", a, b)
    assert code == 2 and "protocol.json' is damaged" in err
