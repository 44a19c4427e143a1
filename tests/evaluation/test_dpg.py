"""DPG-Bench: the dependency rule, tiles, categories, the official program's quirks and files, and the command."""

import csv
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation import dpg
from fewstep.evaluation.dpg import LostQuestion, in_order, mplug, score_dpg, tile_score
from fewstep.evaluation.dpg_files import Question, check_prompts, grid, read_items, read_prompts, tiles

SIDE = 8
COLUMNS = (
    *("item_id", "text", "keywords", "proposition_id", "dependency"),
    *("category_broad", "category_detailed", "tuple", "question_natural_language"),
)


def question(number, *parents, category="entity - whole"):
    return Question(number, f"question {number}?", parents, category)


def ask(yes):
    """Answers of questions by number."""
    return {number: "yes" if held else "no" for number, held in yes.items()}


def line(item, number, dependency="0", kind="entity - whole (cat)", text="Is there a cat?"):
    return dict(zip(COLUMNS, (item, f"prompt {item}", "", number, dependency, "", "", kind, text)))


def write_csv(file, lines):
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    return file


def tile(level):
    """An image of one grey, whose level says which questions hold: bit n - 1 for the n-th."""
    return Image.new("RGB", (SIDE, SIDE), (level,) * 3)


def bits(image, text):
    """A judge: question text ends in its number, the tile's grey has a bit for it."""
    number = int(re.findall(r"\d+", text)[-1])
    return "yes" if image.getpixel((0, 0))[0] >> (number - 1) & 1 else "no"


def lines_of(item, dependencies, kinds=None):
    return [
        line(item, n, d, (kinds or {}).get(n, "entity - whole (cat)"), f"Is it, or not, number {n}")
        for n, d in enumerate(dependencies, 1)
    ]


FILLER = line("unused", 1)  # the first line of questions is lost on the official program


@pytest.fixture
def bench(tmp_path):
    """Two items: b hangs on nothing, a is a chain 1 <- 2 <- 3; the csv and a folder of grids."""
    folder = tmp_path / "grids"
    folder.mkdir()
    kinds = {1: "entity - whole (cat)", 2: "attribute - color (cat, red)", 3: "relation - spatial (cat, mat, on)"}
    chain = lines_of("a", ["0", "1", "2"], kinds)
    file = write_csv(tmp_path / "dpg_bench.csv", [FILLER, *chain, *lines_of("b", ["0", "0"])])
    grid([tile(0b111), tile(0b110), tile(0b101), tile(0b110)]).save(folder / "a.png")
    grid([tile(0b11), tile(0b01), tile(0b00), tile(0b11)]).save(folder / "b.png")
    return SimpleNamespace(folder=folder, csv=file, out=tmp_path / "out")


# the rule


@pytest.mark.parametrize("mode", dpg.MODES)
def test_a_child_counts_only_where_its_parents_hold_and_zeros_go_down_the_chain(mode):
    chain = [question(1), question(2, 1), question(3, 2)]
    assert tile_score(chain, ask({1: False, 2: True, 3: True}), mode) == 0
    assert tile_score(chain, ask({1: True, 2: False, 3: True}), mode) == pytest.approx(1 / 3)
    assert tile_score(chain, ask({1: True, 2: True, 3: False}), mode) == pytest.approx(2 / 3)
    assert tile_score(chain, ask({1: True, 2: True, 3: True}), mode) == 1


@pytest.mark.parametrize("mode", dpg.MODES)
def test_all_of_several_parents_must_hold(mode):
    both = [question(1), question(2), question(3, 1, 2)]
    assert tile_score(both, ask({1: True, 2: False, 3: True}), mode) == pytest.approx(1 / 3)
    assert tile_score(both, ask({1: True, 2: True, 3: True}), mode) == 1


@pytest.mark.parametrize("answer", ["Yes", "yes.", "yes, it is", "", "no"])
def test_only_the_word_yes_holds(answer):
    assert tile_score([question(1)], {1: answer}) == 0


def test_a_child_before_its_parent_sees_the_raw_answer_officially_and_the_rule_when_corrected():
    """3 <- 2 <- 1 with 1 no, listed 3, 2, 1: once through, 3 sees 2 before 2 falls."""
    backwards = [question(3, 2), question(2, 1), question(1)]
    answers = ask({1: False, 2: True, 3: True})
    assert tile_score(backwards, answers, "official") == pytest.approx(1 / 3)
    assert tile_score(backwards, answers, "corrected") == 0


def test_parents_come_before_children_and_circles_are_refused():
    tangled = [question(4, 2, 3), question(3, 1), question(2, 1), question(1)]
    order = [q.number for q in in_order(tangled)]
    assert all(order.index(p) < order.index(q.number) for q in tangled for p in q.parents)
    with pytest.raises(UserError, match=r"questions \[1, 2\] depend on each other in a circle"):
        in_order([question(1, 2), question(2, 1), question(3)])
    with pytest.raises(UserError, match="depends on 7, which its item lacks"):
        in_order([question(1, 7)])


# pictures


def test_a_grid_of_four_is_cut_into_the_same_four_row_by_row():
    four = [tile(level) for level in (10, 20, 30, 40)]
    whole = grid(four)
    assert whole.size == (2 * SIDE, 2 * SIDE)
    assert whole.getpixel((SIDE, 0))[0] == 20 and whole.getpixel((0, SIDE))[0] == 30
    cut = tiles(whole, SIDE, 4, "x")
    assert [np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(cut, four)] == [True] * 4
    assert [image.getpixel((0, 0))[0] for image in tiles(whole, SIDE, 2, "x")] == [10, 20]


def test_pictures_of_another_size_are_refused_and_a_single_image_serves_alone():
    with pytest.raises(UserError, match="'x' is 8x8, not 2 x 2 images of 8"):
        tiles(tile(1), SIDE, 4, "x")
    with pytest.raises(UserError, match="not 2 x 2 images of 16"):
        tiles(grid([tile(1)] * 4), 16, 4, "x")
    assert tiles(tile(5), SIDE, 1, "x")[0].getpixel((0, 0))[0] == 5
    for images in ([tile(1)] * 3, [tile(1)] * 3 + [Image.new("RGB", (4, 8))], []):
        with pytest.raises(UserError, match="four images of one size"):
            grid(images)


# scores


def test_tiles_average_to_pictures_and_pictures_to_the_score(bench):
    found = score_dpg(bench.folder, bench.csv, bits, SIDE)
    # a: 111 -> 1, 110 (1 is no) -> 0, 101 -> 1/3, 110 -> 0.   b: 1, 1/2, 0, 1
    assert [row["tiles"] for row in found["rows"]] == [[1, 0, pytest.approx(1 / 3), 0], [1, 0.5, 0, 1]]
    assert found["score"] == pytest.approx(100 * ((4 / 3) / 4 + 2.5 / 4) / 2)
    assert (found["images"], found["items"], found["failed"]) == (2, 2, {})


def test_categories_count_raw_answers_of_the_last_tile_officially_and_of_all_when_corrected(bench):
    """a's last tile says no, yes, yes: the children's yes counts, though the tile's score is 0."""
    official = score_dpg(bench.folder, bench.csv, bits, SIDE)
    assert official["l2"] == {
        "attribute - color": 100,
        "entity - whole": pytest.approx(100 * (0 + 2) / 3),
        "relation - spatial": 100,
    }
    assert official["l1"] == {"attribute": 100, "entity": pytest.approx(100 * 2 / 3), "relation": 100}
    write_csv(bench.csv, list(csv.DictReader(bench.csv.open()))[1:])
    corrected = score_dpg(bench.folder, bench.csv, bits, SIDE, mode="corrected")
    assert corrected["l1"] == {"attribute": 75, "entity": pytest.approx(100 * (2 + 5) / 12), "relation": 100}
    assert corrected["score"] == pytest.approx(official["score"])


def test_the_number_of_tiles_looked_at_is_a_choice(bench):
    found = score_dpg(bench.folder, bench.csv, bits, SIDE, pictures=1)
    assert [row["tiles"] for row in found["rows"]] == [[1], [1]]
    with pytest.raises(UserError, match="pictures=5: a picture holds 1 to 4"):
        score_dpg(bench.folder, bench.csv, bits, SIDE, pictures=5)


# the official program's quirks, by mode


def test_the_first_line_of_questions_is_lost_officially(tmp_path):
    file = write_csv(tmp_path / "q.csv", lines_of("a", ["0", "0", "2"]))
    assert [q.number for q in read_items(file)["a"].questions] == [2, 3]
    assert [q.number for q in read_items(file, official=False)["a"].questions] == [1, 2, 3]


def test_an_item_that_hangs_on_a_lost_question_is_left_out_officially_and_said_so(bench):
    write_csv(bench.csv, [*lines_of("a", ["0", "1", "2"]), *lines_of("b", ["0", "0"])])
    found = score_dpg(bench.folder, bench.csv, bits, SIDE)
    assert list(found["failed"]) == ["a.png"] and "question 1 is lost" in found["failed"]["a.png"]
    assert (found["images"], found["items"]) == (1, 2)
    assert found["score"] == pytest.approx(100 * 2.5 / 4)
    assert score_dpg(bench.folder, bench.csv, bits, SIDE, mode="corrected")["images"] == 2


def test_a_lost_parent_is_officially_missed_only_behind_parents_that_hold():
    """The official program stops at the first parent that does not hold."""
    lost = [question(1), question(2, 1, 9)]
    assert tile_score(lost, ask({1: False, 2: True})) == 0
    with pytest.raises(LostQuestion, match="question 9 is lost"):
        tile_score(lost, ask({1: True, 2: True}))


def test_other_files_and_broken_pictures_are_left_out_officially_and_refused_when_corrected(bench):
    write_csv(bench.csv, [*lines_of("b", ["0", "0"]), FILLER])
    (bench.folder / "notes.txt").write_text("no picture")
    (bench.folder / "a.png").rename(bench.folder / "unused.png")
    (bench.folder / "unused.png").write_bytes(b"broken")
    failed = score_dpg(bench.folder, bench.csv, bits, SIDE)["failed"]
    assert sorted(failed) == ["notes.txt", "unused.png"]
    assert "name pictures by item_id" in failed["notes.txt"] and "cannot decode" in failed["unused.png"]
    with pytest.raises(UserError, match=r"notes\.txt': no item has that name"):
        score_dpg(bench.folder, bench.csv, bits, SIDE, mode="corrected")


def test_items_without_a_picture_or_with_two_are_refused_when_corrected(bench):
    with pytest.raises(UserError, match="has no pictures of item 'unused': DPG-Bench wants one of each"):
        score_dpg(bench.folder, bench.csv, bits, SIDE, mode="corrected")
    write_csv(bench.csv, list(csv.DictReader(bench.csv.open()))[1:])
    grid([tile(1)] * 4).save(bench.folder / "a.jpg")
    with pytest.raises(UserError, match="has 2 pictures of item 'a'"):
        score_dpg(bench.folder, bench.csv, bits, SIDE, mode="corrected")


def test_lines_that_come_twice_count_last_officially_and_are_refused_when_corrected(tmp_path):
    again = [FILLER, line("a", 1, text="first?"), line("a", 1, text="second?")]
    file = write_csv(tmp_path / "q.csv", again)
    assert [q.text for q in read_items(file)["a"].questions] == ["second?"]
    with pytest.raises(UserError, match="question line 4: item 'a' has a question 1 already"):
        read_items(file, official=False)


def test_an_item_in_two_pieces_starts_anew_officially_and_is_joined_when_corrected(tmp_path):
    file = write_csv(tmp_path / "q.csv", [FILLER, line("a", 1), line("b", 1), line("a", 2)])
    assert [q.number for q in read_items(file)["a"].questions] == [2]
    assert [q.number for q in read_items(file, official=False)["a"].questions] == [1, 2]


def test_modes_have_names(bench):
    with pytest.raises(UserError, match="no mode 'offical': did you mean 'official'"):
        score_dpg(bench.folder, bench.csv, bits, SIDE, mode="offical")


# files


def test_questions_are_read_with_their_parents_and_categories(tmp_path):
    file = write_csv(
        tmp_path / "q.csv", [FILLER, line("a", 3, "1, 2", "attribute - color (mat, red)", "Is it, then, red?")]
    )
    (found,) = read_items(file)["a"].questions
    assert found == Question(3, "Is it, then, red?", (1, 2), "attribute - color")
    assert read_items(file)["a"].prompt == "prompt a"


BROKEN = {
    "question line 3 cannot be read": [FILLER, line("a", 1, "none")],
    "question line 2 cannot be read": [line("a", "first"), FILLER],
    "has no questions": [],
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_csv_that_cannot_be_read_is_named_by_its_line(tmp_path, message):
    with pytest.raises(UserError, match=message):
        read_items(write_csv(tmp_path / "q.csv", BROKEN[message]), official=False)


def test_other_files_are_no_questions(tmp_path):
    (tmp_path / "q.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(UserError, match="has no column 'proposition_id'"):
        read_items(tmp_path / "q.csv")
    with pytest.raises(UserError, match="no questions in"):
        read_items(tmp_path / "nowhere.csv")


def test_prompts_are_read_by_id_and_must_be_the_csvs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"prompt {name}\n")
    prompts = read_prompts(tmp_path)
    assert prompts == {"a": "prompt a", "b": "prompt b"}
    items = read_items(write_csv(tmp_path / "q.csv", [FILLER, line("a", 1), line("b", 1)]))
    check_prompts(prompts, items)
    with pytest.raises(UserError, match="item 'b' has questions and no prompts"):
        check_prompts({"a": "x"}, items)
    with pytest.raises(UserError, match="item 'c' has prompts and no questions"):
        check_prompts({**prompts, "c": "x"}, items)
    with pytest.raises(UserError, match="no prompts in"):
        read_prompts(tmp_path / "nowhere")


def test_results_and_details_are_written_in_the_official_form(bench):
    found = score_dpg(bench.folder, bench.csv, bits, SIDE, out=bench.out)
    results, detail = found["files"]
    assert re.fullmatch(r"dpg-bench_\d{8}-\d{6}_results\.txt", results.name)
    assert detail.name == results.name.replace(".txt", "_detail.txt")
    lines = results.read_text().splitlines()
    assert lines[0] == f"{bench.folder / 'a.png'}, 1.0, 0.0, {1 / 3}, 0.0, {found['rows'][0]['score']}"
    assert lines[2:4] == ["Model: grids", "L1 category scores:"]
    assert lines[4] == "\tattribute: 100.0" and "L2 category scores:" in lines
    assert lines[-1] == f"DPG-Bench score: {found['score']}"
    asked = detail.read_text().splitlines()
    assert len(asked) == 4 * (3 + 2)
    assert asked[3] == f"{bench.folder / 'a.png'}, (8, 0, 16, 8), Is it, or not, number 1, no"


def test_nothing_to_score_is_refused(bench, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*pictures <id>.png"):
        score_dpg(tmp_path / "nowhere", bench.csv, bits, SIDE)
    with pytest.raises(UserError, match="holds no picture of an item"):
        score_dpg(tmp_path, bench.csv, bits, SIDE)
    with pytest.raises(UserError, match="not 2 x 2 images of 512"):
        score_dpg(bench.folder, bench.csv, bits, 512)


# judges and the command


def test_mplug_is_asked_by_modelscope_from_its_folder(tmp_path, monkeypatch):
    def pipeline(task, model, device):
        assert (task, model, device) == ("visual-question-answering", str(tmp_path), "gpu")
        return lambda said: {"text": f"{said['question']} of {said['image']}"}

    monkeypatch.setitem(sys.modules, "modelscope.pipelines", SimpleNamespace(pipeline=pipeline))
    assert mplug(tmp_path)("an image", "Is it?") == "Is it? of an image"


def test_without_mplug_the_mend_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="modelscope download --model damo/mplug"):
        mplug(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "modelscope.pipelines", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        mplug(tmp_path)


def test_the_command_scores_a_folder_with_a_judge_by_name(bench, capsys):
    (bench.folder / "notes.txt").write_text("")
    words = [str(bench.folder), "--questions", str(bench.csv), "--resolution", str(SIDE)]
    assert dpg.main([*words, "--vqa", f"{__name__}:bits"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in shown[:4]] == ["attribute", "entity", "relation", "score"]
    assert "of 2 of 2 prompts" in shown[3]
    assert shown[4].startswith("left out: notes.txt")
    assert len(list(bench.folder.parent.glob("dpg-bench_*_results.txt"))) == 1  # beside the pictures, not among them


def test_the_command_needs_one_judge(bench, capsys):
    words = [str(bench.folder), "--questions", str(bench.csv), "--resolution", str(SIDE)]
    for more, message in (
        ([], "--mplug FOLDER or --vqa"),
        (["--vqa", "nothing:here"], "--vqa=nothing:here: write module"),
    ):
        assert dpg.main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_the_command_line_says_what_is_wrong_in_one_line(tmp_path):
    words = ["--questions", "q.csv", "--resolution", "8", "--vqa", "json:dumps"]
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.evaluation.dpg", str(tmp_path), *words], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no questions in 'q.csv'") and done.stderr.count("\n") == 1
