"""Prompts as benchmarks publish them."""

import json

import pytest

from fewstep.errors import UserError
from fewstep.evaluation.prompt_sets import PromptSet, read_prompts


def _written(tmp_path, said, name="p.json"):
    file = tmp_path / name
    file.write_text(said if isinstance(said, str) else json.dumps(said), encoding="utf-8")
    return file


def test_lines_and_lists_hold_a_prompt_each(tmp_path):
    want = ("a cat", "ein Würfel")
    assert read_prompts(_written(tmp_path, "a cat\nein Würfel\n", "p.txt")).texts == want
    assert read_prompts(_written(tmp_path, list(want))).texts == want
    assert read_prompts(_written(tmp_path, [{"id": str(i), "prompt": p} for i, p in enumerate(want)])).texts == want


def test_coco_gives_each_image_its_caption_of_smallest_id_sorted_by_image(tmp_path):
    notes = [
        {"id": 9, "image_id": 20, "caption": "late"},
        {"id": 4, "image_id": 30, "caption": " a \n dog "},
        {"id": 7, "image_id": 20, "caption": "early"},
        {"id": 8, "image_id": 5, "caption": "only"},
    ]
    assert read_prompts(_written(tmp_path, {"annotations": notes})).texts == ("only", "early", "a dog")


def test_styles_and_categories_become_groups_and_names_of_pictures(tmp_path):
    folder = tmp_path / "styles"
    folder.mkdir()
    _written(folder, ["p0", "p1"], "photo.json")
    _written(folder, ["a0"], "anime.json")
    found = read_prompts(folder)
    assert found.texts == ("a0", "p0", "p1")
    assert found.groups == ("anime", "photo", "photo")
    assert found.names == ("anime/00000", "photo/00000", "photo/00001")
    mjhq = {"x1": {"category": "food", "prompt": "soup"}, "x2": {"category": "art", "prompt": "ink"}}
    found = read_prompts(_written(tmp_path, mjhq))
    assert (found.texts, found.names) == (("soup", "ink"), ("food/x1", "art/x2"))


def test_a_cut_takes_the_first_and_of_groups_an_equal_share():
    plain = PromptSet(tuple("abcdef"))
    assert plain.first(3).texts == tuple("abc")
    grouped = PromptSet(tuple("abcdef"), tuple("xxxyyy"), tuple("123456"))
    assert grouped.first(4).groups == tuple("xxyy")
    with pytest.raises(UserError, match="there are 6 prompts, not 7"):
        plain.first(7)


def test_order_and_words_make_the_digest():
    digests = {PromptSet(t).sha256 for t in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""))}
    assert len(digests) == 4


def test_the_second_of_two_equal_prompts_is_named():
    with pytest.raises(UserError, match=r"prompts 1 and 3 \(from 0\) are the same, 'b'"):
        PromptSet(("a", "b", "c", "b")).refuse_duplicates()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{", "is no JSON"),
        ("3", "neither a list nor a mapping"),
        ("[]", "no list of prompts"),
        ('["a", " "]', "entry 1"),
        ('[{"text": "a"}]', "entry 0"),
        ('{"x": {"prompt": "a"}}', "at 'x' has no category"),
        ('{"x": {"prompt": 3, "category": "c"}}', "entry x"),
        ('{"annotations": [{"id": 1}]}', "no caption file of COCO"),
    ],
)
def test_what_holds_no_prompts_is_refused_by_name(tmp_path, said, words):
    with pytest.raises(UserError) as caught:
        read_prompts(_written(tmp_path, said))
    assert words in str(caught.value) and "p.json" in str(caught.value)


def test_an_empty_folder_and_another_suffix_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.json file in"):
        read_prompts(tmp_path)
    with pytest.raises(UserError, match="is none of"):
        read_prompts(_written(tmp_path, "a", "p.csv"))
