"""The report of a run folder, as a file that a browser without network shows whole."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.engine.curves import grouped, series, stage_starts, thinned
from fewstep.engine.preview import save_grid
from fewstep.engine.report import WIDEST, report, seconds, spread, usage
from fewstep.errors import UserError

RECIPE = "method: decoupled_dmd\nteacher:\n  from: <somewhere>\ntrain:\n  steps: 40\n  batch: 8\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with nothing but a recipe."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def log(folder: Path, *lines: dict) -> None:
    """Writes metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """Tags with their attributes, and whether every one that must be closed is closed."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(folder: Path) -> tuple[str, Page]:
    """The report's text, and its tags."""
    text = report(folder).read_text()
    return text, Page(text)


def full(folder: Path) -> None:
    """Fills a run folder with all that a report can show."""
    lines = [
        {"step": s, "time": s / 10, "stage": "warm" if s <= 20 else "distil", "loss.dm": 1 / s}
        for s in range(10, 50, 10)
    ]
    log(
        folder,
        *lines,
        {"step": 40, "time": 4.2, "stage": "distil", "validation.fid": 0.3},
        {"step": 40, "warning": "std drifts"},
    )
    for step in (0, 20, 40):
        save_grid(torch.zeros(4, 1, 8, 8), folder / "previews" / f"step-{step:06d}.png")
    save_grid(torch.ones(4, 1, 8, 8), folder / "grid.png")
    rows = [
        {"who": w, "steps": s, "nfe": s, "fid": 1 / s, "features": "digits-cnn", "n": 1797}
        for w in ("teacher", "student")
        for s in (1, 4)
    ]
    (folder / "scores.json").write_text(json.dumps({"rows": rows}))
    (folder / "model").mkdir()
    (folder / "model" / "README.md").write_text('text\n```python\npipe = load("FOLDER")\n```\n')


def test_a_page_is_whole_and_asks_nothing_of_the_network(run):
    full(run)
    text, page = written(run)
    assert page.open == []
    assert not page.all("script") + page.all("link") + page.all("iframe")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert not re.search(r"url\((?!#)|@import", text)
    hrefs = [h for _, a in page.tags for k, h in a.items() if k in ("href", "xlink:href") and not h.startswith("#")]
    assert hrefs == ["https://arxiv.org/abs/2511.22677"]


def test_a_page_shows_scores_samples_previews_curves_warnings_and_how_to_load(run):
    full(run)
    text, page = written(run)
    assert len(page.all("img")) == 1 + 3
    assert len(page.all("svg")) == 3  # score curve, losses, validation
    assert len(page.all("tr")) >= 1 + 4
    for words in (
        "my-run",
        "Decoupled DMD",
        "fid[digits-cnn]",
        "std drifts",
        "step 20",
        "Losses: dm",
        "1,797",
        f'load("{run / "model"}")',
    ):
        assert words.replace('"', "&#34;") in text or words in text


def test_noise_levels_share_one_picture_a_name_and_are_no_curves(run):
    lines = [{"step": s, **{f"level.{n}.{k}": 1.0 + k for k in range(8) for n in ("dm", "ca")}} for s in (1, 2, 3)]
    log(run, *[{"loss.dm": 1.0, **line} for line in lines])
    text, page = written(run)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions == ["Losses: dm", "Loss by noise level: dm", "Loss by noise level: ca"]
    assert len(page.all("svg")) == 3
    assert text.count(">step 1<") == text.count(">step 3<") == 2  # a line for each part of training


def test_further_pictures_have_their_own_heading(run):
    for step in range(0, 200, 10):
        save_grid(torch.zeros(4, 1, 8, 8), run / "previews" / "negative-time" / f"step-{step:06d}.png")
    save_grid(torch.zeros(4, 1, 8, 8), run / "previews" / "step-000190.png")
    text, page = written(run)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:2] == ["Previews while training", "negative time"]
    assert len(page.all("img")) == 1 + 8
    assert text.count("step 190<") == 2


def test_the_last_page_among_the_previews_is_shown_in_a_frame_that_sees_nothing_else(run):
    (run / "previews").mkdir()
    for step in (10, 20):
        (run / "previews" / f"step-{step:06d}.html").write_text(f'<script>show("{step}")</script>')
    text, page = written(run)
    (frame,) = page.all("iframe")
    assert frame["srcdoc"] == '<script>show("20")</script>' and frame["sandbox"] == "allow-scripts"
    assert not page.all("script") and "Samples of step 20" in text


def test_a_run_without_metrics_is_still_readable(run):
    text, page = written(run)
    assert page.open == []
    assert "no numbers yet" in text
    assert "fewstep export" in text


def test_words_from_files_cannot_become_markup(run):
    log(
        run,
        {"step": 1, "stage": "<b>one", "loss.<i>": 1.0},
        {"step": 2, "stage": "two", "loss.<i>": 2.0, "warning": "<script>"},
    )
    text, page = written(run)
    assert "&lt;somewhere&gt;" in text
    assert not page.all("b") + page.all("i") + page.all("script")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        report(tmp_path)


def test_a_report_may_go_elsewhere_and_leaves_nothing_half_written(run, tmp_path):
    assert report(run, tmp_path / "new" / "r.html") == tmp_path / "new" / "r.html"
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["r.html"]
    assert not (run / "report.html").exists()


def test_equal_runs_make_equal_reports(run):
    full(run)
    assert report(run).read_bytes() == report(run).read_bytes()


def test_a_large_picture_is_shown_smaller(run):
    Image.new("L", (2 * WIDEST, 10)).save(run / "grid.png")
    _, page = written(run)
    data = base64.b64decode(page.all("img")[0]["src"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (WIDEST, 5)


def test_stages_begin_where_the_one_before_logged_last():
    lines = [{"step": s, "stage": stage} for s, stage in ((10, "a"), (20, "a"), (30, "b"), (40, "b"))]
    assert stage_starts(lines) == [(0, "a"), (20, "b")]


def test_losses_share_a_plot_and_numbers_of_other_units_do_not():
    found = series(
        [{"step": 1, "time": 1.0, "stage": "a", "loss.dm": 1.0, "loss.ca": 2.0, "validation.fid": 3.0, "lag": 4.0}]
    )
    assert {t: list(n) for t, n in grouped(found).items()} == {
        "Losses": ["dm", "ca"],
        "validation: fid": ["fid"],
        "lag": ["lag"],
    }


def test_numbers_that_are_no_points_are_left_out():
    lines = [{"step": 1, "loss.a": float("nan")}, {"step": 2, "loss.a": 2.0}, {"step": 3, "loss.b": float("inf")}]
    assert series(lines) == {"loss.a": [(2, 2.0)]}


def test_thinning_keeps_the_mean_and_the_number_of_points_small():
    points = [(float(i), float(i * i)) for i in range(1200)]
    short = thinned(points, 300)
    assert len(short) == 300
    assert sum(y for _, y in short) / 300 == pytest.approx(sum(y for _, y in points) / 1200)
    assert thinned(points[:300], 300) == points[:300]


def test_training_time_adds_up_over_resumed_runs():
    assert seconds([{"time": t} for t in (1.0, 5.0, 0.5, 2.0, 1.0)]) == 5.0 + 2.0 + 1.0


def test_previews_are_spread_from_the_first_to_the_last():
    files = [Path(str(i)) for i in range(21)]
    assert [int(f.name) for f in spread(files, 5)] == [0, 5, 10, 15, 20]
    assert spread(files[:3], 5) == files[:3]


def test_a_model_without_a_pipeline_is_loaded_through_its_family(tmp_path):
    assert usage(tmp_path / "absent") is None
    assert f'open_model("{tmp_path}")' in usage(tmp_path)
