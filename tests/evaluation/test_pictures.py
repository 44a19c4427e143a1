"""Pictures are cut and resized as the protocol says, on both sides alike, and read in blocks."""

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.evaluation.fid import Moments, frechet_distance
from fewstep.evaluation.pictures import find_pictures, fitted
from fewstep.evaluation.protocols import ResizeSpec, load_protocol
from fewstep.evaluation.scorer import Scorer
from fewstep.evaluation.statistics import Statistics, write_statistics


def _images(n, height, width, channels=3):
    return torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


def _saved(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        pixels = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear"])
def test_a_resize_is_pillows_of_the_middle_square(name):
    image = _images(1, 20, 27)[0]
    made = fitted(image, ResizeSpec(size=12, filter=name))
    whole = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    want = whole.crop((3, 0, 23, 20)).resize((12, 12), Image.Resampling[name.upper()])
    assert torch.equal(made, torch.from_numpy(np.array(want)).permute(2, 0, 1))


def test_a_picture_of_that_size_is_left_as_it_is():
    image = _images(1, 16, 16, channels=1)[0]
    assert fitted(image, ResizeSpec(size=16, filter="lanczos")) is image
    assert fitted(image, ResizeSpec(size=8)).shape == (1, 8, 8)


def test_blocks_are_the_pictures_in_order_whatever_their_length(tmp_path):
    images = _images(7, 8, 8)
    pictures = find_pictures(_saved(tmp_path / "p", images), None, None)
    for rows in (1, 3, 7, 64):
        found = list(pictures.blocks(None, rows))
        assert torch.equal(torch.cat([block for _, block in found]), images)
        assert [part.start for part, _ in found] == list(range(0, 7, rows))


def test_sizes_may_differ_only_under_a_resize(tmp_path):
    folder = _saved(tmp_path / "p", [*_images(2, 8, 8), _images(1, 9, 8)[0]])
    pictures = find_pictures(folder, None, None)
    with pytest.raises(UserError, match=r"002\.png' is 8x9 and .*000\.png' 8x8"):
        list(pictures.blocks(None))
    assert next(pictures.blocks(ResizeSpec(size=8)))[1].shape == (3, 3, 8, 8)


def test_class_folders_give_labels_and_a_cut_takes_of_each(tmp_path):
    (tmp_path / "set").mkdir()
    for name in "ab":
        _saved(tmp_path / "set" / name, _images(4, 8, 8))
    found = find_pictures(tmp_path / "set", None, 4)
    assert found.labels.tolist() == [0, 0, 1, 1]


@pytest.fixture
def rules(tmp_path):
    """FID and coverage of grey 8 x 8 pictures against a folder, both sides cut to 8."""
    _saved(tmp_path / "real", _images(30, 8, 11, channels=1))
    (tmp_path / "p.yaml").write_text(
        "metrics: {fid: digits-cnn, prdc: digits-cnn}\nresize: {size: 8}\nreference: {path: real, count: 30}\n"
    )
    return tmp_path / "p.yaml"


def test_a_folder_against_itself_is_at_distance_zero_and_names_what_it_saw(rules, tmp_path):
    scored = Scorer(load_protocol(rules)).score(find_pictures(tmp_path / "real", None, None), None)
    values = {s.protocol.metric: s for s in scored.scores}
    assert values["fid"].value < 1e-6 and values["coverage"].value == 1
    assert values["fid"].protocol.resize == "centre crop, bicubic to 8; then none"
    assert values["fid"].protocol.reference.startswith("real n=30 sha256=")
    Image.new("L", (8, 8)).save(tmp_path / "real" / "004.png")
    again = Scorer(load_protocol(rules)).score(find_pictures(tmp_path / "real", None, None), None)
    assert again.scores[0].protocol.reference != values["fid"].protocol.reference


def test_a_reference_of_another_count_is_refused(rules, tmp_path):
    (tmp_path / "real" / "004.png").unlink()
    with pytest.raises(UserError, match=r"has 29 images, not 30"):
        Scorer(load_protocol(rules))


def test_statistics_stand_in_for_real_pictures_where_the_distance_needs_no_more(rules, tmp_path):
    pictures = find_pictures(_saved(tmp_path / "made", _images(40, 8, 8, channels=1)), None, None)
    scorer = Scorer(load_protocol(rules))
    network = scorer.networks["digits-cnn"]
    direct = scorer.score(pictures, None).scores[0].value
    real = torch.cat(
        [network.features(x) for _, x in find_pictures(tmp_path / "real", None, None).blocks(ResizeSpec(size=8))]
    )
    write_statistics(Statistics.of(Moments.of(real), network), tmp_path / "real.safetensors")
    said = "metrics: {fid: digits-cnn}\nresize: {size: 8}\nreference: {path: real.safetensors}\n"
    (tmp_path / "s.yaml").write_text(said)
    found = Scorer(load_protocol(tmp_path / "s.yaml")).score(pictures, None).scores[0]
    assert found.value == pytest.approx(direct, rel=1e-6)
    made = next(pictures.blocks(None))[1]
    assert found.value == pytest.approx(
        frechet_distance(Moments.of(network.features(made)), Moments.of(real)), rel=1e-6
    )
    assert found.protocol.reference.startswith("statistics n=30 sha256=")
    (tmp_path / "s.yaml").write_text(said.replace("fid", "prdc"))
    with pytest.raises(UserError, match="prdc needs reference"):
        Scorer(load_protocol(tmp_path / "s.yaml")).score(pictures, None)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("metrics: {fdi: digits-cnn}", "did you mean 'fid'"),
        ("metrics: {fid: digit-cnn}", "did you mean 'digits-cnn'"),
        ("metrics: {fid: null}", "no feature network is named"),
        ("metrics: {fid: {feature: digits-cnn}}", "unknown key 'feature'"),
        ("metrics: {hpsv2: x}", "metrics.hpsv2='x' is no mapping"),
        ("metrics: {fid: digits-cnn}\nreference: {path: nowhere}", "reference images are missing: get it, put it at"),
        ("metrics: {fid: digits-cnn}\nreference: {source: labels, classes: 3}", "has no images"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_drawn(tmp_path, said, words):
    (tmp_path / "p.yaml").write_text(said)
    with pytest.raises(UserError) as caught:
        Scorer(load_protocol(tmp_path / "p.yaml"))
    assert words in str(caught.value)
