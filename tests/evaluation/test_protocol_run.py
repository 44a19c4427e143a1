"""A protocol on the real command line: drawn, resumed, scored, refused."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image

import fewstep.exporting.pipeline as exporting
from fewstep.evaluation.manifest import read_manifest, read_scores
from fewstep.evaluation.prompt_sets import PromptSet
from fewstep.resources import asset
from tests.models.tiny_sd import tiny_sd
from tests.rewards.tiny import clip as tiny_clip

from .benchmark import PROMPTS, evaluated, protocol, said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    tiny_clip(place)
    return place


@pytest.fixture
def rules(tmp_path, judge):
    return protocol(tmp_path, judge)


@pytest.fixture
def drawn(monkeypatch):
    """Numbers of images in the order in which `generate` is asked for them."""
    plain, asked = exporting.generate, []

    def counted(*given, **options):
        asked.extend(options.get("numbers") or range(given[1]))
        return plain(*given, **options)

    monkeypatch.setattr(exporting, "generate", counted)
    return asked


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, judge):
    """A finished run of six images in batches of two, which tests may copy."""
    from fewstep.cli.main import main

    place = tmp_path_factory.mktemp("whole")
    rules = protocol(place, judge)
    words = ["evaluate", model, "--protocol", rules, "--out", place / "out", "--steps", 1, "--batch", 2]
    assert main([str(word) for word in words]) == 0
    return place / "out"


def _files(folder):
    return {file.name: file.read_bytes() for file in (folder / "images").iterdir()}


def test_a_run_leaves_images_manifest_scores_values_and_a_contact_sheet(whole):
    names = {file.name for file in whole.iterdir()}
    assert names == {
        *("images", "manifest.jsonl", "prompts.txt", "run.json"),
        *("metrics.json", "values.jsonl", "protocol.json", "contact.png"),
    }
    samples = read_manifest(whole / "manifest.jsonl")
    assert [sample.prompt for sample in samples] == list(PROMPTS)
    assert (whole / "prompts.txt").read_text().splitlines() == list(PROMPTS)
    assert [sample.index for sample in samples] == list(range(6))
    assert Image.open(whole / "contact.png").width == 6 * 160


def test_a_score_is_the_mean_of_the_values_within_its_interval(whole):
    rows = [json.loads(line) for line in (whole / "values.jsonl").read_text().splitlines()]
    for score in read_scores(whole / "metrics.json"):
        column = torch.tensor([row[score.protocol.metric] for row in rows], dtype=torch.float64)
        assert score.value == pytest.approx(column.mean().item())
        assert column.min() <= score.interval[0] < score.value < score.interval[1] <= column.max()
        assert score.protocol.reference == f"prompts sha256={PromptSet(PROMPTS).sha256[:16]}"


def test_hpsv2_is_a_hundred_times_the_cosine(whole):
    """At one set of weights the two metrics differ by that factor, and by Pillow's rounding of pixels."""
    values = {score.protocol.metric: score.value for score in read_scores(whole / "metrics.json")}
    assert values["hpsv2"] == pytest.approx(100 * values["clip_score.cosine"], abs=0.5)


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_cut_off_goes_on_without_drawing_again_and_scores_the_same(
    model, rules, whole, tmp_path, capsys, monkeypatch, drawn, after
):
    counted = exporting.generate

    def cut(*given, **options):
        if len(drawn) >= 2 * after:
            raise KeyboardInterrupt
        return counted(*given, **options)

    words = [model, "--protocol", rules, "--out", tmp_path / "out", "--steps", 1, "--batch", 2]
    monkeypatch.setattr(exporting, "generate", cut)
    code, _, err = said(capsys, "evaluate", *words)
    assert code == 1 and err.endswith("error: interrupted\n")
    monkeypatch.setattr(exporting, "generate", counted)
    evaluated(capsys, *words)
    assert sorted(drawn) == list(range(6))
    assert _files(tmp_path / "out") == _files(whole)
    for name in ("metrics.json", "values.jsonl", "manifest.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (whole / name).read_text()


def test_a_finished_run_is_scored_again_without_a_draw(model, rules, whole, tmp_path, capsys, drawn):
    shutil.copytree(whole, tmp_path / "out")
    found = evaluated(capsys, model, "--protocol", rules, "--out", tmp_path / "out", "--steps", 1, "--batch", 2)
    assert drawn == []
    assert found["scores"] == [s.plain() for s in read_scores(whole / "metrics.json")]
    assert (found["n"], found["nfe"], found["steps"]) == (6, read_manifest(whole / "manifest.jsonl")[0].nfe, 1)


def test_only_a_picture_that_is_gone_is_drawn_anew_and_is_the_same(model, rules, whole, tmp_path, capsys, drawn):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "images" / "000003.png").unlink()
    evaluated(capsys, model, "--protocol", rules, "--out", tmp_path / "out", "--steps", 1, "--batch", 2)
    assert drawn == [3]
    assert _files(tmp_path / "out") == _files(whole)


def test_a_line_that_was_cut_off_in_the_middle_costs_one_image(model, rules, whole, tmp_path, capsys, drawn):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "manifest.jsonl").read_text()
    (out / "manifest-0.part.jsonl").write_text(lines[:-40])
    (out / "manifest.jsonl").unlink()
    evaluated(capsys, model, "--protocol", rules, "--out", out, "--steps", 1, "--batch", 2)
    assert drawn == [5]
    assert (out / "manifest.jsonl").read_text() == lines


def test_image_i_is_the_same_at_batch_1_and_8(model, rules, whole, tmp_path, capsys):
    evaluated(capsys, model, "--protocol", rules, "--out", tmp_path / "out", "--steps", 1, "--batch", 1)
    for name in _files(whole):
        one, two = (
            torch.tensor(list(Image.open(place / "images" / name).tobytes())) for place in (tmp_path / "out", whole)
        )
        assert (one - two).abs().max() <= 1  # up to rounding in the network


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed", 3], "seed was 0, not 3"),
        (["--steps", 2], "steps was 1, not 2"),
        (["--guidance", 2.0], "guidance was None, not 2.0"),
        (["--batch", 3], "batch was 2, not 3"),
    ],
)
def test_a_folder_of_another_run_is_refused_by_the_field_that_differs(
    model, rules, whole, tmp_path, capsys, change, words
):
    shutil.copytree(whole, tmp_path / "out")
    asked = ["--protocol", rules, "--out", tmp_path / "out", "--steps", 1, "--batch", 2, *change]
    code, _, err = said(capsys, "evaluate", model, *asked)
    assert code == 2 and words in err and "choose another --out" in err


def test_another_model_and_other_prompts_are_refused(rules, whole, tmp_path, capsys, model):
    shutil.copytree(whole, tmp_path / "out")
    asked = ["--protocol", rules, "--out", tmp_path / "out", "--steps", 1, "--batch", 2]
    code, _, err = said(capsys, "evaluate", tiny_sd(tmp_path / "other", seed=1), *asked)
    assert code == 2 and "another run: model was" in err
    (tmp_path / "else.txt").write_text("\n".join(reversed(PROMPTS)))
    code, _, err = said(capsys, "evaluate", model, *asked, "--prompts", tmp_path / "else.txt")
    assert code == 2 and "another run: prompts was other ones" in err


def test_fewer_images_score_the_first_and_more_go_on(model, rules, tmp_path, capsys, drawn):
    asked = [model, "--protocol", rules, "--out", tmp_path / "out", "--steps", 1, "--batch", 2]
    assert evaluated(capsys, *asked, "--n", 4)["n"] == 4
    assert evaluated(capsys, *asked)["n"] == 6
    assert evaluated(capsys, *asked, "--n", 2)["n"] == 2
    assert drawn == list(range(6))


def test_the_images_of_a_run_are_scored_from_their_folder_alike(rules, whole, capsys):
    found = evaluated(capsys, whole, "--protocol", rules)
    assert found["scores"] == [s.plain() for s in read_scores(whole / "metrics.json")]
    assert found["out"] is None


def test_a_missing_and_a_changed_picture_of_a_manifest_are_named(rules, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    file = tmp_path / "out" / "images" / "000004.png"
    Image.open(tmp_path / "out" / "images" / "000001.png").save(file)
    code, _, err = said(capsys, "evaluate", tmp_path / "out", "--protocol", rules)
    assert code == 2 and "000004.png' is not the picture of its manifest" in err
    file.unlink()
    code, _, err = said(capsys, "evaluate", tmp_path / "out", "--protocol", rules)
    assert code == 2 and "names 1 pictures that are not there" in err and "000004.png" in err


def test_pictures_of_other_prompts_are_refused(rules, whole, tmp_path, capsys):
    (tmp_path / "else.txt").write_text("\n".join([*PROMPTS[:2], "another", *PROMPTS[3:]]))
    code, _, err = said(capsys, "evaluate", whole, "--protocol", rules, "--prompts", tmp_path / "else.txt")
    assert code == 2 and "image 2 shows 'red boats', the protocol's prompt is 'another'" in err


def test_pictures_from_elsewhere_go_by_their_order(rules, whole, tmp_path, capsys):
    shutil.copytree(whole / "images", tmp_path / "flat")
    found = evaluated(capsys, tmp_path / "flat", "--protocol", rules)
    assert found["values"] == {s.protocol.metric: s.value for s in read_scores(whole / "metrics.json")}
    (tmp_path / "flat" / "000005.png").unlink()
    code, _, err = said(capsys, "evaluate", tmp_path / "flat", "--protocol", rules)
    assert code == 2 and "has 5 pictures, the protocol 6" in err


def test_an_empty_folder_is_refused(rules, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, _, err = said(capsys, "evaluate", tmp_path / "empty", "--protocol", rules)
    assert code == 2 and "is empty" in err


def test_duplicated_prompts_are_refused_before_anything_is_drawn(model, rules, tmp_path, capsys, drawn):
    (tmp_path / "twice.txt").write_text("a cat\na dog\na cat\n")
    asked = ["--protocol", rules, "--prompts", tmp_path / "twice.txt", "--out", tmp_path / "out"]
    code, _, err = said(capsys, "evaluate", model, *asked)
    assert code == 2 and "prompts 0 and 2 (from 0) are the same, 'a cat'" in err
    assert drawn == [] and not (tmp_path / "out").exists()


def test_styles_have_means_of_their_own_and_a_spread_over_chunks(model, judge, tmp_path, capsys):
    """Named as the benchmark names its pictures; a constant cosine c gives 100 c and no spread."""
    (tmp_path / "styles").mkdir()
    for style in ("anime", "photo"):
        (tmp_path / "styles" / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(3)]))
        (tmp_path / "pictures" / style).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (90 * i, 40, 200)).save(tmp_path / "pictures" / style / f"{i:05d}.jpg")
    rules = protocol(tmp_path, judge, prompts={"path": "styles"}, metrics={"hpsv2": {"from": str(judge)}})
    found = evaluated(capsys, tmp_path / "pictures", "--protocol", rules, "--out", tmp_path / "out")
    values, rows = found["values"], (tmp_path / "out" / "values.jsonl").read_text().splitlines()
    column = [json.loads(row)["hpsv2"] for row in rows]
    assert list(values) == ["hpsv2", "hpsv2.anime", "hpsv2.anime.std", "hpsv2.photo", "hpsv2.photo.std"]
    assert values["hpsv2.photo"] == pytest.approx(sum(column[3:]) / 3)
    assert values["hpsv2"] == pytest.approx((values["hpsv2.anime"] + values["hpsv2.photo"]) / 2)
    assert values["hpsv2.anime.std"] == 0  # three images are one chunk
    (tmp_path / "pictures" / "photo" / "00001.jpg").unlink()
    code, _, err = said(capsys, "evaluate", tmp_path / "pictures", "--protocol", rules)
    assert code == 2 and "photo/00001' (.png, .jpg, .jpeg, .webp)" in err


def test_several_images_of_a_prompt_count_as_one_for_the_interval(model, judge, tmp_path, capsys):
    rules = protocol(tmp_path, judge, per_prompt=2)
    found = evaluated(capsys, model, "--protocol", rules, "--out", tmp_path / "out", "--steps", 1)
    assert found["n"] == 12
    rows = [json.loads(line) for line in (tmp_path / "out" / "values.jsonl").read_text().splitlines()]
    samples = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [s.prompt for s in samples] == [text for text in PROMPTS for _ in range(2)]
    assert len({s.sha256 for s in samples}) == 12
    assert found["values"]["hpsv2"] == pytest.approx(sum(row["hpsv2"] for row in rows) / 12)


def test_a_model_of_classes_is_scored_against_a_source_with_set_metrics(tmp_path, capsys):
    (tmp_path / "digits.yaml").write_text(
        "n: 20\nmetrics: {fid: digits-cnn, accuracy: {features: digits-cnn}, high_frequency: null, reward: {classifier: null}}\n"
        "reference: {source: digits}\nlatency: {warmup: 1, runs: 2}\n"
    )
    asked = [asset("teachers/digits"), "--steps", 1, "--out", tmp_path / "out"]
    found = evaluated(capsys, *asked, "--protocol", tmp_path / "digits.yaml")
    plain = evaluated(
        capsys, tmp_path / "out", "--metrics", "fid,accuracy,high_frequency,reward", "--reward", "classifier",
        "--features", "digits-cnn", "--reference", "digits",
    )  # fmt: skip
    assert found["values"] == pytest.approx(plain["values"], rel=1e-6)
    assert found["latency"]["runs"] == 2 and found["latency"]["median_ms"] > 0
    again = evaluated(capsys, *asked, "--protocol", tmp_path / "digits.yaml", "--metrics", "fid")
    assert list(again["values"]) == ["fid"] and again["latency"] == found["latency"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--protocol", "hpsv3"], "did you mean 'hpsv2'"),
        (["--prompts", "x.txt"], "--prompts belongs to a protocol"),
        (["--teacher", "x"], "give --steps, e.g. --steps 1,2,4,8"),
        (["--steps", "1,x"], "--steps=1,x: write whole numbers"),
        (["--steps", "0"], "write numbers from 1"),
    ],
)
def test_bad_options_are_one_line(model, capsys, words, error):
    code, _, err = said(capsys, "evaluate", model, *words)
    assert code == 2 and error in err and err.count("\n") == 1


def test_a_protocol_says_its_own_networks_and_where_images_go(model, rules, capsys, tmp_path):
    for words, error in (
        ([], "give --out DIR"),
        (["--reward", "clip", "--out", tmp_path / "o"], "--reward: a protocol says its own"),
        (["--metrics", "hpsv", "--out", tmp_path / "o"], "did you mean 'hpsv2'"),
    ):
        code, _, err = said(capsys, "evaluate", model, "--protocol", rules, *words)
        assert code == 2 and error in err


def test_a_model_that_does_not_fit_is_refused(model, rules, judge, tmp_path, capsys):
    code, _, err = said(capsys, "evaluate", asset("teachers/digits"), "--protocol", rules, "--out", tmp_path / "a")
    assert code == 2 and "takes no prompts, and the protocol has some" in err
    large = protocol(tmp_path / "large", judge, size=512)
    code, _, err = said(capsys, "evaluate", model, "--protocol", large, "--out", tmp_path / "b", "--steps", 1)
    assert code == 2 and "the protocol's images are 512x512, this model draws 16x16" in err


def _launched(processes, *words):
    """`fewstep evaluate` in so many processes, with what they wrote when it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port, "-m", "fewstep"]
    command = [sys.executable, *launch, "evaluate", *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_two_and_leaves_what_one_leaves(model, rules, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[:2]))
    for i in range(2, 6):
        (out / "images" / f"{i:06d}.png").unlink()
    code, told = _launched(2, model, "--protocol", rules, "--out", out, "--steps", 1, "--batch", 2)
    assert code == 0, told
    assert told.count("hpsv2[hpsv2]") == 1  # one of them answers
    assert _files(out) == _files(whole)
    for name in ("manifest.jsonl", "metrics.json", "values.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text()
