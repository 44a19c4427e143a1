"""Prompts in files of JSON lines: columns, bare strings, and lines that hold none. Plain text: tests/data/test_source.py."""

import json

import pytest
import torch

from fewstep.data.encoded import dressed, fitting
from fewstep.data.registry import make_source
from fewstep.errors import UserError
from fewstep.models.denoiser import Denoiser
from fewstep.roles import Role, RoleSpec, assemble
from tests.models.tiny_flux import tiny_flux
from tests.models.tiny_sd import tiny_sd


def _file(tmp_path, *lines):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def _source(file, **more):
    return make_source({"source": "prompts", "path": str(file), **more})


def test_a_line_of_json_is_an_object_or_a_bare_string(tmp_path):
    file = _file(tmp_path, {"prompt": "a cat", "seed": 3}, '"a dog"', {"prompt": "ein\u2028Haus"})
    source = _source(file)
    assert len(source) == 3
    assert source.fetch(torch.tensor([2, 0, 1, 0]), None)["prompt"] == ["ein\u2028Haus", "a cat", "a dog", "a cat"]


def test_the_column_is_chosen_by_name(tmp_path):
    file = _file(tmp_path, {"caption": "a cat", "prompt": "no"}, {"caption": "a dog", "prompt": "no"})
    assert _source(file, column="caption").prompts == ["a cat", "a dog"]


def test_equal_prompts_have_one_key_in_either_form(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_text("a cat\na dog\n")
    assert _source(text).content_key() == _source(_file(tmp_path, '"a cat"', {"prompt": "a dog"})).content_key()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"promt": "a dog"}, r"line 2 of '.*' has no column 'prompt': did you mean 'promt'\?"),
        ({"text": "a dog"}, "has no column 'prompt': known: text"),
        ({"prompt": 3}, "line 2 .* has no text in 'prompt'"),
        ({"prompt": " "}, "has an empty 'prompt'"),
        ('{"prompt": ', "line 2 .* is no JSON"),
        ("[1]", "is neither an object nor a string"),
        ("", "line 2 .* is no JSON"),
    ],
)
def test_a_line_without_a_prompt_is_named_or_on_request_left_out(tmp_path, line, words):
    file = _file(tmp_path, {"prompt": "a cat"}, line, {"prompt": "a bird"})
    with pytest.raises(UserError, match=words) as caught:
        _source(file)
    assert "skip_corrupt: true" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=f"left out 1 of 3 lines .*{words}"):
        assert _source(file, skip_corrupt=True).prompts == ["a cat", "a bird"]


def test_a_file_of_nothing_but_broken_lines_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none of the 2 lines .* did you mean 'prompt_en'"):
        _source(_file(tmp_path, {"prompt_en": "a"}, {"prompt_en": "b"}), skip_corrupt=True)


@pytest.mark.parametrize(("size", "side"), [(16, 8), (32, 16)])
def test_prompts_say_the_size_that_a_network_of_any_size_draws(tmp_path, size, side):
    source = _source(_file(tmp_path, {"prompt": "a cat"}), size=size)
    teacher = RoleSpec.model_validate({"from": str(tiny_flux(tmp_path / "flux"))})
    handles = assemble([Role("teacher")], {"teacher": teacher}, 0, fit=fitting({"train": source}))
    assert Denoiser.of(handles["teacher"]).row_shape == (4, side, side)
    rows = dressed({"train": source}, handles)["train"].fetch(torch.tensor([0]), None)
    assert "x0" not in rows and "prompt_embeds" in rows["cond"]


def test_a_network_of_one_size_is_not_asked_for_another(tmp_path):
    teacher = RoleSpec.model_validate({"from": str(tiny_sd(tmp_path / "sd"))})
    for size, fits in ((16, True), (32, False)):
        sources = {"train": _source(_file(tmp_path, {"prompt": "a cat"}), size=size)}
        if fits:
            assert assemble([Role("teacher")], {"teacher": teacher}, 0, fit=fitting(sources))
            continue
        with pytest.raises(UserError, match=r"data\.train\.size=32: .* latents of \(8, 8\) alone: leave size out"):
            assemble([Role("teacher")], {"teacher": teacher}, 0, fit=fitting(sources))
