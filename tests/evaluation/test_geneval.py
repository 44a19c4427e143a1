"""GenEval: 240 scenes whose truth is known, every boundary of the rules, the files, and the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation import geneval
from fewstep.evaluation.detection import box_of
from fewstep.evaluation.geneval import Instances, Rules, iou, kept, relations, score_geneval, score_image, summary
from fewstep.evaluation.geneval_files import (
    CLASSES,
    COLORS,
    RELATIONS,
    TASKS,
    arrange,
    find_pictures,
    read_prompts,
    read_results,
    write_results,
)
from tests.rewards.tiny import clip

from .tiny_detector import mask2former

RGB = {
    "red": (224, 0, 0),
    "orange": (224, 128, 0),
    "yellow": (224, 224, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 224),
    "purple": (128, 0, 160),
    "pink": (224, 128, 192),
    "brown": (96, 64, 0),
    "black": (0, 0, 0),
    "white": (224, 224, 224),
}
NOTHING = (64, 64, 64)


# scenes: every object is a filled box whose colour says, in its low bits, what it is


def draw(objects, size=128):
    """objects: (class, colour, left, top, width, height)."""
    pixels = np.full((size, size, 3), NOTHING, np.uint8)
    for number, (name, color, left, top, width, height) in enumerate(objects, 1):
        index = CLASSES.index(name)
        code = np.asarray([index % 10, index // 10, number])  # each below 32: the palette's steps
        pixels[top : top + height, left : left + width] = np.asarray(RGB[color]) + code
    return Image.fromarray(pixels)


def eyes(scores=None):
    """A detector that reads the drawing; scores: of the n-th object, else .95."""

    def detect(image, least):
        pixels, found = np.asarray(image).astype(int) @ [1 << 16, 1 << 8, 1], {}
        for code in np.unique(pixels):
            low, high, number = (int(code) >> shift & 31 for shift in (16, 8, 0))
            if number == 0:
                continue
            mask = pixels == code
            box = [*box_of(mask), (scores or {}).get(number, 0.95)]
            found.setdefault(CLASSES[10 * high + low], []).append((box, mask))
        return {
            name: Instances(np.asarray([b for b, _ in pairs], np.float32), np.stack([m for _, m in pairs]))
            for name, pairs in found.items()
        }

    return detect


def palette(image, objects, name):
    """A judge of colours that looks at the middle of each box."""
    pixels = np.asarray(image).astype(int)
    middles = [pixels[int(b[1] + b[3]) // 2, int(b[0] + b[2]) // 2] for b in objects.boxes]
    return [min(RGB, key=lambda color: np.abs(np.asarray(RGB[color]) - middle // 32 * 32).sum()) for middle in middles]


CELLS = [(8, 8), (48, 8), (88, 8), (8, 48), (48, 48), (88, 48), (8, 88), (48, 88), (88, 88)]
STEP = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Scenes:
    """Prompts with a drawing each, and whether the drawing is what the prompt asks for, by construction."""

    def __init__(self, seed):
        self.draws = np.random.RandomState(seed)

    def some(self, things, n):
        return [things[i] for i in self.draws.permutation(len(things))[:n]]

    def box(self, name, color, cell):
        return (name, color, *cell, *(int(side) for side in self.draws.randint(10, 24, 2)))

    def scene(self, task):
        self.right = bool(self.draws.randint(2))
        prompt, objects = getattr(self, task)()
        return {"tag": task, **prompt, "prompt": f"a scene of {task}"}, objects, self.right

    def single_object(self):
        a, other = self.some(CLASSES, 2)
        cells = self.some(CELLS, 2)
        seen = [self.box(a if self.right else other, "red", cells[0])]
        return {"include": [{"class": a, "count": 1}]}, [*seen, self.box(other, "blue", cells[1])]

    def two_object(self):
        a, b, other = self.some(CLASSES, 3)
        names = (a, b) if self.right else self.some([(a, other), (other, b), (a, a)], 1)[0]
        seen = [self.box(name, "green", cell) for name, cell in zip(names, self.some(CELLS, 2))]
        return {"include": [{"class": a, "count": 1}, {"class": b, "count": 1}]}, seen

    def counting(self):
        (a,), n = self.some(CLASSES, 1), int(self.draws.randint(2, 5))
        shown = n if self.right else n + int(self.draws.choice([-1, 1]))
        include, exclude = [{"class": a, "count": n}], [{"class": a, "count": n + 1}]
        return {"include": include, "exclude": exclude}, [self.box(a, "pink", c) for c in self.some(CELLS, shown)]

    def colors(self):
        (a,), (color, wrong) = self.some(CLASSES[1:], 1), self.some(COLORS, 2)
        seen = [self.box(a, color if self.right else wrong, *self.some(CELLS, 1))]
        return {"include": [{"class": a, "count": 1, "color": color}]}, seen

    def position(self):
        (a, b), relation = self.some(CLASSES, 2), self.some(RELATIONS, 1)[0]
        dx, dy = STEP[relation if self.right else OPPOSITE[relation]]
        seen = [(b, "black", 54, 54, 20, 20), (a, "white", 54 + 40 * dx, 54 + 40 * dy, 20, 20)]
        return {"include": [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]}, seen

    def color_attr(self):
        (a, b), (one, two) = self.some(CLASSES[1:], 2), self.some(COLORS, 2)
        shown = (one, two) if self.right else self.some([(two, one), (one, one), (two, two)], 1)[0]  # swapped, leaked
        seen = [self.box(name, color, cell) for name, color, cell in zip((a, b), shown, self.some(CELLS, 2))]
        return {"include": [{"class": a, "count": 1, "color": one}, {"class": b, "count": 1, "color": two}]}, seen


def lay_out(folder, scenes, per_prompt=1):
    """The official layout of (prompt, pictures) pairs, and the prompt file."""
    for number, (prompt, pictures) in enumerate(scenes):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt))
        for i, picture in enumerate(pictures):
            picture.save(samples / f"{i:04d}.png")
    lines = "".join(json.dumps(prompt) + "\n" for prompt, _ in scenes)
    (folder.parent / "evaluation_metadata.jsonl").write_text(lines)
    return folder


def test_240_scenes_are_judged_as_they_were_made(tmp_path):
    """40 of each task, half of them wrong in a way of that task, through the folders, the detector and the colours."""
    maker = Scenes(0)
    scenes = [maker.scene(task) for task in TASKS for _ in range(40)]
    folder = lay_out(tmp_path / "images", [(prompt, [draw(objects)]) for prompt, objects, _ in scenes])
    found = score_geneval(folder, eyes(), palette, tmp_path / "evaluation_metadata.jsonl")
    truth = [right for _, _, right in scenes]
    assert [row["correct"] for row in found["rows"]] == truth
    assert all(bool(row["reason"]) != row["correct"] for row in found["rows"])
    for i, task in enumerate(TASKS):
        rights = truth[40 * i : 40 * i + 40]
        assert 10 < sum(rights) < 30
        assert found["tasks"][task] == {"score": sum(rights) / 40, "correct": sum(rights), "images": 40}
    assert found["overall"] == pytest.approx(sum(truth) / 240)


# boundaries


def score(objects, prompt, scores, tmp):
    file = tmp / "one.png"
    draw(objects).save(file)
    return score_image(file, {"prompt": "x", **prompt}, eyes(scores), palette)


def asks(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include), **({"exclude": list(exclude)} if exclude else {})}


def row_of(name, n, color="red"):
    return [(name, color, 10 * i, 0, 8, 8) for i in range(n)]


ONE, FIRST_ABOVE = {"class": "dog", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}
THREE = asks("counting", {"class": "dog", "count": 3}, exclude=[{"class": "dog", "count": 4}])


def up(x):
    return float(np.nextafter(np.float32(x), np.float32(1)))


@pytest.mark.parametrize("tag, least", [("single_object", 0.3), ("position", 0.3), ("counting", 0.9)])
def test_an_object_counts_strictly_above_its_tasks_threshold(tmp_path, tag, least):
    prompt, dog = asks(tag, ONE), row_of("dog", 1)
    assert not score(dog, prompt, {1: least}, tmp_path)["correct"]
    assert score(dog, prompt, {1: up(least)}, tmp_path)["correct"]


def test_three_of_three_is_right_and_a_fourth_counts_from_above_point_nine(tmp_path):
    assert score(row_of("dog", 3), THREE, None, tmp_path)["correct"]
    assert not score(row_of("dog", 2), THREE, None, tmp_path)["correct"]
    assert score(row_of("dog", 4), THREE, {4: 0.90}, tmp_path)["correct"]
    assert not score(row_of("dog", 4), THREE, {4: 0.91}, tmp_path)["correct"]


def test_without_an_exclusion_more_than_enough_is_right(tmp_path):
    assert score(row_of("dog", 5), asks("two_object", {"class": "dog", "count": 2}), None, tmp_path)["correct"]


def test_colour_is_asked_of_the_best_boxes_only_and_of_each_of_them(tmp_path):
    two, one = ({"class": "dog", "count": n, "color": "red"} for n in (2, 1))
    dogs = [*row_of("dog", 1, "blue"), ("dog", "red", 40, 0, 8, 8), ("dog", "red", 60, 0, 8, 8)]
    best_is_blue, best_is_red = {1: 0.99}, {1: 0.5, 2: 0.9, 3: 0.8}
    assert not score(dogs, asks("colors", one), best_is_blue, tmp_path)["correct"]
    assert score(dogs, asks("colors", one), best_is_red, tmp_path)["correct"]
    assert not score(dogs, asks("colors", two), best_is_blue, tmp_path)["correct"]
    assert score(dogs, asks("colors", two), best_is_red, tmp_path)["correct"]


def test_colours_are_not_looked_at_where_too_few_are_found(tmp_path):
    def blind(image, objects, name):
        raise AssertionError("nothing to look at")

    draw(row_of("dog", 1)).save(tmp_path / "one.png")
    prompt = {"prompt": "x", **asks("colors", {"class": "dog", "count": 2, "color": "red"})}
    assert not score_image(tmp_path / "one.png", prompt, eyes(), blind)["correct"]


def test_a_place_counts_only_beside_an_object_that_is_itself_as_asked(tmp_path):
    scene = [("cat", "blue", 50, 80, 20, 20), ("dog", "red", 50, 10, 20, 20)]
    cat = {"class": "cat", "count": 1}
    assert score(scene, asks("position", cat, FIRST_ABOVE), None, tmp_path)["correct"]
    wrong = score(scene, asks("position", {**cat, "color": "red"}, FIRST_ABOVE), None, tmp_path)
    assert not wrong["correct"] and "nothing there to be above" in wrong["reason"]


def test_each_box_must_be_at_its_place_from_each_box_of_the_other(tmp_path):
    cats = [("cat", "blue", x, 80, 10, 10) for x in (40, 60)]
    dogs = [("dog", "red", x, 10, 10, 10) for x in (40, 60)]
    two = asks("position", {"class": "cat", "count": 2}, {**FIRST_ABOVE, "count": 2})
    assert score([*cats, *dogs], two, None, tmp_path)["correct"]
    for number, moved in ((0, ("cat", "blue", 40, 0, 10, 8)), (3, ("dog", "red", 60, 110, 10, 10))):
        scene = [*cats, *dogs]
        scene[number] = moved
        assert not score(scene, two, None, tmp_path)["correct"]


def boxes(*scores, size=10):
    return Instances(np.asarray([[20 * i, 0, 20 * i + size, size, s] for i, s in enumerate(scores)], np.float32))


def test_the_best_sixteen_are_kept_best_first():
    seen = boxes(*np.linspace(0.4, 0.9, 20))
    found = kept(seen, 0.3)
    assert len(found) == 16
    assert found.boxes[:, 4].tolist() == sorted(seen.boxes[:, 4].tolist(), reverse=True)[:16]
    assert len(kept(boxes(*[0.5] * 17), 0.3)) == 16
    assert len(kept(boxes(*[0.5] * 15), 0.3)) == 15


def test_masks_go_with_their_boxes():
    seen = Instances(boxes(0.4, 0.9, 0.2, 0.6).boxes, np.arange(4)[:, None, None] * np.ones((4, 2, 2)))
    assert kept(seen, 0.3).masks[:, 0, 0].tolist() == [1, 3, 0]


def test_scores_are_compared_in_float32():
    """float32(.3) is 1.2e-8 above .3: in float64 it would pass."""
    assert float(np.float32(0.3)) > 0.3
    assert len(kept(boxes(0.3), 0.3)) == 0


def test_overlapping_boxes_are_dropped_only_where_asked_and_from_the_given_overlap_on():
    """Ten by ten against ten by five, in whole pixels: 50 / 100."""
    seen = Instances(np.asarray([[0, 0, 9, 9, 0.9], [0, 0, 9, 4, 0.8], [50, 0, 59, 9, 0.7]], np.float32))
    assert iou(seen.boxes[0], seen.boxes[1]) == 0.5
    assert len(kept(seen, 0.3)) == 3
    assert kept(seen, 0.3, Rules(overlap=0.5)).boxes[:, 0].tolist() == [0, 50]
    assert len(kept(seen, 0.3, Rules(overlap=0.51))) == 3
    assert len(kept(Instances(np.repeat(seen.boxes[:1], 2, 0)), 0.3)) == 2  # official: equal boxes count twice


def test_boxes_side_by_side_share_a_pixel_column_by_that_rule():
    assert iou(np.asarray([0, 0, 9, 9]), np.asarray([9, 0, 18, 9])) == pytest.approx(10 / 190)
    assert iou(np.asarray([0, 0, 9, 9]), np.asarray([10, 0, 19, 9])) == 0


# relations


def point(x, y):
    return np.asarray([x, y, x, y, 1], np.float32)


def test_relations_of_the_worked_example():
    """d = (-40, 0), d' = -38, dx = -.95."""
    assert relations(np.asarray([0, 0, 10, 10]), np.asarray([40, 0, 50, 10])) == {"left of"}
    assert relations(np.asarray([40, 0, 50, 10]), np.asarray([0, 0, 10, 10])) == {"right of"}
    assert relations(np.asarray([0, 0, 10, 10]), np.asarray([40, 40, 50, 50])) == {"left of", "above"}  # -38 / 56.57
    assert relations(np.asarray([40, 40, 50, 50]), np.asarray([0, 0, 10, 10])) == {"right of", "below"}


def test_one_place_has_no_relation_to_itself():
    assert relations(np.asarray([0, 0, 10, 10]), np.asarray([0, 0, 10, 10])) == set()


def test_an_offset_must_exceed_a_tenth_of_both_sizes_together():
    """Sides 10 and 10: the offset loses 2. d = 2.0 leaves nothing, 3.9 leaves 1.9 / 3.9 < 1/2, 4.1 leaves 2.1 / 4.1 > 1/2."""
    a = np.asarray([0, 0, 10, 10])
    for d, held in ((2.0, set()), (3.9, set()), (4.1, {"right of"})):
        assert relations(a + np.asarray([d, 0, d, 0]), a) == held
    assert relations(a + np.asarray([3.9, 0, 3.9, 0]), a, margin=0.05) == {"right of"}


def test_a_direction_holds_strictly_above_half():
    """d = (4, 3), |d| = 5, widths 15 together: dx = (4 - 1.5) / 5 = 1/2 exactly, dy = 3/5."""

    def seen(width):
        return relations(np.asarray([4 - width / 2, 3, 4 + width / 2, 3]), point(0, 0))

    assert seen(15) == {"below"}
    assert seen(14.99) == {"below", "right of"}
    assert seen(15.01) == {"below"}


def test_offsets_below_a_thousandth_of_a_pixel_are_none():
    assert relations(point(0.0009, 0), point(0, 0)) == set()
    assert relations(point(0.0011, 0), point(0, 0)) == {"right of"}
    assert relations(point(0, -0.0011), point(0, 0)) == {"above"}


@pytest.mark.parametrize("degrees", range(0, 360, 15))
def test_points_hold_every_direction_within_sixty_degrees(degrees):
    """cos > 1/2: so one direction near an axis, two between 30 and 60 degrees off."""
    x, y = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    held = {"right of": x > 0.501, "left of": x < -0.501, "below": y > 0.501, "above": y < -0.501}
    if min(abs(abs(x) - 0.5), abs(abs(y) - 0.5)) > 0.01:
        assert relations(point(100 * x, 100 * y), point(0, 0)) == {name for name, holds in held.items() if holds}


# files


def small(tmp_path, per_prompt=2):
    """Two prompts, of which the second comes out right once."""
    first, second = (
        {"prompt": f"a {name}", **asks("single_object", {"class": name, "count": 1})} for name in ("dog", "cat")
    )
    dog, nothing = draw(row_of("dog", 1)), draw([])
    cats = [draw(row_of("cat", 1)), nothing][:per_prompt]
    return lay_out(tmp_path / "images", [(first, [dog] * per_prompt), (second, cats)])


def test_results_are_read_by_the_official_summary(tmp_path):
    """What its script does with the file: one table by pandas, means by tag, any by metadata."""
    pandas = pytest.importorskip("pandas")
    found = score_geneval(small(tmp_path), eyes(), palette, out=tmp_path / "out" / "results.jsonl")
    table = pandas.read_json(tmp_path / "out" / "results.jsonl", orient="records", lines=True)
    assert list(table) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert table["correct"].mean() == found["correct_images"] == 0.75
    assert table.groupby("metadata")["correct"].any().mean() == found["correct_prompts"] == 1
    assert table.groupby("tag", sort=False)["correct"].mean().mean() == found["overall"]
    assert json.loads(table["metadata"][0]) == {"prompt": "a dog", **asks("single_object", ONE)}
    assert json.loads(table["details"][0]) == {"dog": [[0, 0, 8, 8, pytest.approx(0.95)]]}


def test_results_survive_a_round_trip_and_sum_up_to_the_same(tmp_path):
    found = score_geneval(small(tmp_path), eyes(), palette)
    rows = read_results(write_results(found["rows"], tmp_path / "results.jsonl"))
    assert rows == found["rows"]
    assert summary(rows) == {key: value for key, value in found.items() if key != "rows"}
    assert not (tmp_path / "results.jsonl.part").exists()


def test_overall_is_the_mean_of_the_tasks_and_not_of_the_images():
    rows = [
        {"tag": "colors", "correct": c, "metadata": m}
        for c, m in ((True, "a"), (False, "a"), (False, "b"), (False, "c"))
    ]
    found = summary([*rows, {"tag": "single_object", "correct": True, "metadata": "d"}])
    assert found["overall"] == (1 / 4 + 1) / 2
    assert list(found["tasks"]) == ["single_object", "colors"]  # the papers' order
    assert (found["correct_images"], found["correct_prompts"], found["images"], found["prompts"]) == (0.4, 0.5, 5, 4)


def test_images_in_a_row_are_laid_out_by_prompt_and_found_again(tmp_path):
    prompts = [{"prompt": name, **asks("single_object", {"class": name, "count": 1})} for name in ("dog", "cat")]
    files = [tmp_path / f"{i:06d}.png" for i in range(8)]
    for i, file in enumerate(files):
        draw([], size=8 + i).save(file)
    arrange(files, prompts, tmp_path / "laid")
    found = find_pictures(tmp_path / "laid", prompts)
    assert [str(file.relative_to(tmp_path / "laid")) for file, _ in found][3:5] == [
        "00000/samples/0003.png",
        "00001/samples/0000.png",
    ]
    assert [Image.open(file).width for file, _ in found] == list(range(8, 16))
    assert [prompt["prompt"] for _, prompt in found] == ["dog"] * 4 + ["cat"] * 4
    with pytest.raises(UserError, match="is not empty"):
        arrange(files, prompts, tmp_path / "laid")
    with pytest.raises(UserError, match="7 images for 2 prompts: GenEval wants 4 a prompt"):
        arrange(files[:7], prompts, tmp_path / "other")


def test_five_digit_names_and_grids_beside_the_samples_are_fine(tmp_path):
    folder = small(tmp_path)
    (folder / "00000" / "samples" / "0000.png").rename(folder / "00000" / "samples" / "00000.png")
    draw([]).save(folder / "00000" / "grid.png")
    (folder / "notes").mkdir()
    assert len(find_pictures(folder)) == 4


def _spoilt(change):
    def spoil(folder):
        change(folder / "00001")

    return spoil


LAYOUT = {
    "no readable metadata.jsonl": _spoilt(lambda home: (home / "metadata.jsonl").unlink()),
    "is no GenEval prompt": _spoilt(lambda home: (home / "metadata.jsonl").write_text("{")),
    r"no images in .*samples": _spoilt(lambda home: [f.unlink() for f in (home / "samples").iterdir()]),
    "is not named by digits": _spoilt(
        lambda home: (home / "samples" / "0001.png").rename(home / "samples" / "one.png")
    ),
    "is not named by its prompt's number": _spoilt(lambda home: home.rename(home.with_name("cat"))),
    "has 1 images, .* 2: make as many of each": _spoilt(lambda home: (home / "samples" / "0001.png").unlink()),
    "cannot decode": _spoilt(lambda home: (home / "samples" / "0001.png").write_bytes(b"no")),
}


@pytest.mark.parametrize("message", LAYOUT)
def test_folders_that_are_not_laid_out_so_are_refused_in_a_line(tmp_path, message):
    folder = small(tmp_path)
    LAYOUT[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        score_geneval(folder, eyes(), palette)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*00000/samples/0000.png"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no folder 00000"):
        find_pictures(tmp_path)


def test_folders_must_hold_the_prompts_of_the_prompt_file_all_of_them(tmp_path):
    folder, file = small(tmp_path), tmp_path / "evaluation_metadata.jsonl"
    lines = file.read_text().splitlines()
    assert len(find_pictures(folder, read_prompts(file))) == 4
    file.write_text("\n".join(reversed(lines)))
    with pytest.raises(UserError, match=r"00000' shows 'a dog', the prompt file asks for 'a cat'"):
        find_pictures(folder, read_prompts(file))
    file.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(UserError, match="has 2 of 3 prompts, 00002 is missing"):
        find_pictures(folder, read_prompts(file))
    file.write_text(lines[0])
    with pytest.raises(UserError, match="asks for nothing"):
        find_pictures(folder, read_prompts(file))


PROMPTS = {
    "GenEval has no 'computer mice': did you mean 'computer mouse'": {
        "include": [{"class": "computer mice", "count": 1}]
    },
    "GenEval has no 'gray': known: black, ": {"include": [{**ONE, "color": "gray"}]},
    "GenEval has no 'on': known: above, ": {"include": [ONE, {**ONE, "position": ["on", 0]}]},
    "GenEval has no 'colour': did you mean 'colors'": {"tag": "colour", "include": [ONE]},
    "counts start at 1": {"include": [{"class": "dog", "count": 0}]},
    "refers to an object before its own": {"include": [FIRST_ABOVE]},
    "KeyError: 'include'": {},
    "KeyError: 'count'": {"include": [{"class": "dog"}]},
}


@pytest.mark.parametrize("message", PROMPTS)
def test_a_prompt_that_is_none_is_named_by_its_line(tmp_path, message):
    good = {"tag": "single_object", "include": [ONE], "prompt": "a dog"}
    bad = {"tag": "position", "prompt": "x", **PROMPTS[message]}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(UserError, match=f"line 2.*{message}"):
        read_prompts(tmp_path / "p.jsonl")


def test_prompts_and_results_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    for read, message in ((read_prompts, "no GenEval prompts"), (read_results, "no results of GenEval")):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it is empty"):
        read_prompts(tmp_path / "empty")
    with pytest.raises(UserError, match="no results to sum up"):
        summary(read_results(tmp_path / "empty"))


# the command


def test_the_command_scores_a_folder_with_networks_from_folders(tmp_path, capsys):
    folder = small(tmp_path, per_prompt=1)
    mask2former(tmp_path / "detector")
    clip(tmp_path / "clip")
    words = [str(folder), "--detector", str(tmp_path / "detector"), "--clip", str(tmp_path / "clip")]
    assert geneval.main([*words, "--prompts", str(tmp_path / "evaluation_metadata.jsonl")]) == 0
    rows = read_results(folder / "results.jsonl")
    share = sum(row["correct"] for row in rows) / 2
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:2] == ["single_object", f"{share:.4f}"]
    assert shown[1].startswith(f"overall        {share:.5f}  of 2 images of 2 prompts")
    assert any(json.loads(row["details"]) for row in rows)


def test_the_command_says_what_is_wrong_in_one_line_before_it_loads_a_network(tmp_path):
    words = [sys.executable, "-m", "fewstep.evaluation.geneval", str(tmp_path), "--detector", "a", "--clip", "b"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "has no folder 00000" in done.stderr and done.stderr.count("\n") == 1
