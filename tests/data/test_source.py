"""Registry of sources, their typed config, and the data-free ones."""

import pytest
import torch

from fewstep.data.registry import SOURCES, make_source
from fewstep.data.source import digest
from fewstep.errors import UserError


def test_every_registered_source_is_a_class_with_a_config_that_refuses_unknown_keys():
    for name in SOURCES.names():
        assert SOURCES.get(name).Config.model_config["extra"] == "forbid", name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"source": "digts"}, "unknown data source 'digts': did you mean 'digits'"),
        ({"source": "fashion_mnist", "sise": 16}, "unknown key 'sise': did you mean 'size'"),
        ({"source": "fashion_mnist", "size": 17}, "size=17"),
        ({"source": "labels"}, "'classes' is missing"),
        ({"size": 16}, "write `source: NAME`"),
    ],
)
def test_a_mistake_in_a_data_entry_is_named_with_its_mend(config, words):
    with pytest.raises(UserError) as caught:
        make_source(config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_come_equally_often_and_carry_no_samples():
    source = make_source({"source": "labels", "classes": 10, "count": 1000})
    rows = source.fetch(torch.arange(len(source)), None)
    assert rows.keys() == {"cond"}
    assert rows["cond"]["label"].bincount().tolist() == [100] * 10
    assert (source.row_shape, source.classes) == (None, 10)


def test_a_prompt_has_its_line_number_as_id(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a red cube\r\none\u2028two\nein Würfel\n\n".encode())
    source = make_source({"source": "prompts", "path": str(file)})
    rows = source.fetch(torch.tensor([2, 1, 2]), None)
    assert len(source) == 3
    assert rows["prompt"] == ["ein Würfel", "one\u2028two", "ein Würfel"]
    assert len(rows["cond"]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no file"), (b"", "is empty"), (b"a\n\nb\n", "line 2"), (b"\xff\xfe", "not UTF-8")],
)
def test_a_prompt_file_that_cannot_serve_is_refused(tmp_path, content, words):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=words):
        make_source({"source": "prompts", "path": str(file)})


def test_content_keys_tell_contents_apart_and_nothing_else():
    key = make_source({"source": "labels", "classes": 10}).content_key()
    assert key == make_source({"classes": 10, "source": "labels"}).content_key()
    assert key != make_source({"source": "labels", "classes": 11}).content_key()
    assert digest("ab", "c") != digest("a", "bc")
