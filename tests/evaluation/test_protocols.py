"""Protocols are data: what they may say, and what is said when something is missing."""

import hashlib
import json

import pytest
import yaml

from fewstep.errors import UserError
from fewstep.evaluation.image_metrics import IMAGE_METRICS
from fewstep.evaluation.protocols import changed, load_protocol, protocol_names
from fewstep.evaluation.registry import METRICS


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """An empty data folder."""
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def _written(folder, name="mine.yaml", **said):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump({"metrics": {"hpsv2": None}, **said}))
    return folder / name


def test_the_shipped_ones_say_known_metrics_and_what_they_are():
    assert {"coco2014-30k", "coco2017-5k", "mjhq-30k", "hpsv2", "imagereward"} <= set(protocol_names())
    for name in protocol_names():
        found = load_protocol(name)
        assert found.name == name and found.about
        assert all(metric in IMAGE_METRICS or metric in METRICS for metric in found.metrics)


def test_coco_2014_is_that_of_the_specification():
    found = load_protocol("coco2014-30k")
    assert found.prompts.count == 30_000 and found.reference.count == 40_504
    assert found.resize.words == "centre crop, lanczos to 256"
    assert found.metrics["fid"] == {"features": "inception-clean"}
    assert found.metrics["clip_score"]["prefix"] == "A photo depicts "


@pytest.mark.parametrize("name", ["coco2014-30k", "coco2017-5k", "mjhq-30k", "hpsv2", "imagereward"])
def test_missing_prompts_are_named_with_how_to_get_them_and_where_to_put_them(name, data):
    found = load_protocol(name)
    with pytest.raises(UserError) as caught:
        found.read_prompts()
    assert str(data / found.prompts.path) in str(caught.value)
    assert found.prompts.fetch in str(caught.value)
    assert "--prompts FILE" in str(caught.value)


def test_files_are_found_here_beside_the_protocol_and_in_the_data_folder(tmp_path, data):
    (tmp_path / "a.txt").write_text("beside\n")
    data.mkdir()
    (data / "b.txt").write_text("data\n")
    assert load_protocol(_written(tmp_path, prompts={"path": "a.txt"})).read_prompts().texts == ("beside",)
    assert load_protocol(_written(tmp_path, prompts={"path": "b.txt"})).read_prompts().texts == ("data",)


def test_another_file_than_the_protocols_is_refused_by_its_hash_and_by_its_count(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    right = hashlib.sha256(b"one\ntwo\n").hexdigest()
    assert len(load_protocol(_written(tmp_path, prompts={"path": "p.txt", "sha256": right})).read_prompts()) == 2
    with pytest.raises(UserError, match=rf"has sha256 {right[:12]}, not {'0' * 12}: fetch it anew"):
        load_protocol(_written(tmp_path, prompts={"path": "p.txt", "sha256": "0" * 64})).read_prompts()
    with pytest.raises(UserError, match=r"holds 2 prompts, not 3"):
        load_protocol(_written(tmp_path, prompts={"path": "p.txt", "count": 3})).read_prompts()


def test_duplicates_are_refused_unless_the_protocol_allows_them(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\none\n")
    with pytest.raises(UserError, match="are the same"):
        load_protocol(_written(tmp_path, prompts={"path": "p.txt"})).read_prompts()
    allowed = load_protocol(_written(tmp_path, prompts={"path": "p.txt", "duplicates": True}))
    assert len(allowed.read_prompts()) == 3
    assert len(load_protocol(_written(tmp_path, prompts={"path": "p.txt"}, n=2)).read_prompts()) == 2


def test_several_images_of_a_prompt_stand_side_by_side(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    found = load_protocol(_written(tmp_path, prompts={"path": "p.txt"}, per_prompt=3)).read_prompts()
    assert found.texts == ("one",) * 3 + ("two",) * 3


def test_a_protocol_like_another_says_only_what_differs(tmp_path):
    found = load_protocol(_written(tmp_path, like="coco2014-30k", n=100))
    assert (found.n, found.resize.size, found.name) == (100, 256, "mine")
    assert list(found.metrics) == ["hpsv2"]
    chained = load_protocol(_written(tmp_path, "third.yaml", like="mine.yaml", seed=4))
    assert (chained.n, chained.seed) == (100, 4)
    with pytest.raises(UserError, match="is like itself"):
        load_protocol(_written(tmp_path, "loop.yaml", like="loop.yaml"))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"metric": {}}, "did you mean 'metrics'"),
        ({"resize": {"size": 8, "filter": "nearest"}}, "resize.filter='nearest'"),
        ({"n": 1}, "n=1"),
        ({"metrics": None}, "metrics=None"),
        ({"latency": {"runs": 1}}, "latency.runs=1"),
    ],
)
def test_wrong_keys_and_values_are_named(tmp_path, said, words):
    with pytest.raises(UserError) as caught:
        load_protocol(_written(tmp_path, **said))
    assert words in str(caught.value) and "mine.yaml" in str(caught.value)


def test_unknown_names_files_and_forms_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'hpsv2'"):
        load_protocol("hpsv3")
    with pytest.raises(UserError, match="no protocol file"):
        load_protocol("nowhere.yaml")
    (tmp_path / "list.yaml").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="holds no mapping"):
        load_protocol(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        load_protocol(tmp_path / "bad.yaml")


def test_a_change_is_checked_and_none_changes_nothing(tmp_path):
    found = load_protocol(_written(tmp_path, n=5))
    assert changed(found, n=None) is found
    assert changed(found, n=7).n == 7 and changed(found, n=7).folder == found.folder
    with pytest.raises(UserError, match="n=0"):
        changed(found, n=0)
