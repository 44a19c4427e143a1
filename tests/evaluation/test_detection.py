"""The eyes of GenEval on tiny random networks: shapes, names, thresholds, parity with transformers' own processing."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import transforms
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerImageProcessor

from fewstep.errors import UserError
from fewstep.evaluation import detection
from fewstep.evaluation.detection import (
    ClipColors,
    Mask2Former,
    box_of,
    class_columns,
    clip_pixels,
    crops,
    from_mmdet,
    prepared,
)
from fewstep.evaluation.geneval import Instances
from fewstep.evaluation.geneval_files import CLASSES, COLORS
from tests.rewards.tiny import clip

from .tiny_detector import mask2former

SIZES = {"short": 96, "long": 160}
OPENAI = transforms.Compose(  # CLIP's own preparation of a picture, at the tiny one's size
    [
        transforms.Resize(16, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(16),
        transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
)


def picture(width=80, height=60, seed=0):
    """Smooth noise."""
    coarse = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    mask2former(folder)
    return folder


@pytest.fixture(scope="module")
def detector(place):
    return Mask2Former(place, **SIZES)


@pytest.fixture(scope="module")
def everything(detector):
    return detector(picture(), 0.0)


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip(folder)
    return ClipColors.at(folder), folder


def test_detections_are_boxes_with_scores_and_masks_of_the_images_size_under_genevals_names(everything):
    assert set(everything) <= set(CLASSES)
    for objects in everything.values():
        n = len(objects)
        assert objects.boxes.shape == (n, 5) and objects.boxes.dtype == np.float32
        assert objects.masks.shape == (n, 60, 80) and objects.masks.dtype == bool
        assert [tuple(box[:4]) for box in objects.boxes] == [box_of(mask) for mask in objects.masks]
        assert ((objects.boxes[:, 4] > 0) & (objects.boxes[:, 4] < 1)).all()


@pytest.mark.parametrize("least", [0.05, 0.3, 0.9])
def test_a_threshold_leaves_exactly_the_objects_above_it(detector, everything, least):
    above = {name: objects[np.flatnonzero(objects.boxes[:, 4] > least)] for name, objects in everything.items()}
    above = {name: objects for name, objects in above.items() if len(objects)}
    found = detector(picture(), least)
    assert 0 < sum(map(len, found.values())) < sum(map(len, everything.values()))
    assert set(found) == set(above)
    for name, objects in found.items():
        assert np.array_equal(objects.boxes, above[name].boxes) and np.array_equal(objects.masks, above[name].masks)


def test_at_384_pixels_boxes_scores_and_masks_are_those_of_transformers(tmp_path):
    """transformers cuts every mask at 384 x 384; an image of that size is where both ways are one."""
    model = mask2former(tmp_path, queries=30)
    image = picture(384, 384)
    found = Mask2Former(tmp_path, short=384, long=384)(image, 0.6)
    with torch.no_grad():
        out = model(pixel_values=prepared(image, 384, 384)[0])
    theirs = Mask2FormerImageProcessor().post_process_instance_segmentation(
        out, threshold=0.6, target_sizes=[(384, 384)], return_binary_maps=True
    )[0]
    seen = [
        (CLASSES[s["label_id"]], s["score"], int(theirs["segmentation"][s["id"]].sum()))
        for s in theirs["segments_info"]
    ]
    ours = [(name, box[4], mask.sum()) for name, o in found.items() for box, mask in zip(o.boxes, o.masks)]
    assert len(ours) == len(seen) > 5
    for (name, score, area), (their_name, their_score, their_area) in zip(sorted(ours), sorted(seen)):
        assert (name, area) == (their_name, their_area)
        assert score == pytest.approx(their_score, abs=2e-6)


def test_the_image_goes_in_by_its_short_side_or_its_long_one_and_padded_to_32():
    pixels, seen = prepared(picture(100, 50))
    assert seen == (667, 1333) and pixels.shape == (1, 3, 672, 1344)  # 800 x 1600 would be too long
    assert prepared(picture(64, 64))[1] == (800, 800)
    assert not pixels[..., 667:, :].any() and not pixels[..., 1333:].any()


def test_masks_come_back_to_the_image_without_the_padding_and_weigh_the_score(detector, monkeypatch):
    """100 x 50 goes in as 160 x 80 in 160 x 96: a mask of the upper 40 rows is the image's upper half, not 40 / 96 of it."""
    logits = torch.full((1, 1, 24, 40), -2.0)
    logits[:, :, :10] = 2.0
    classes = torch.full((1, 1, 81), -100.0)
    classes[..., CLASSES.index("dog")], classes[..., 80] = 0.0, math.log(1 / 0.8 - 1)  # dog: probability .8
    answer = SimpleNamespace(masks_queries_logits=logits, class_queries_logits=classes)
    monkeypatch.setattr(detector, "model", lambda pixel_values: answer)
    (name, found), *rest = detector(picture(100, 50), 0.3).items()
    assert (name, rest) == ("dog", [])
    assert found.boxes[0, :4].tolist() == [0, 0, 100, 25]
    assert found.masks[0, :25].all() and not found.masks[0, 25:].any()
    edge, full = found.boxes[0, 4] / 0.8, 1 / (1 + math.exp(-2))
    assert full - 0.03 < edge < full  # a few rows of the edge are less sure


def test_pixels_are_imagenets_standard_ones_and_not_resized_at_their_own_size():
    image = picture(96, 64)
    theirs = Mask2FormerImageProcessor(do_resize=False)(image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(prepared(image, 64, 96)[0], theirs, atol=1e-5)


def test_the_object_of_one_pixel_has_a_box_of_one_pixel_and_none_has_zeros():
    mask = np.zeros((4, 6), bool)
    assert box_of(mask) == (0, 0, 0, 0)
    mask[1, 3] = True
    assert box_of(mask) == (3, 1, 4, 2)


def test_other_names_of_cocos_classes_are_known_and_other_classes_are_passed_over():
    renamed = {"couch": "sofa", "tv": "tvmonitor", "dining table": "diningtable", "airplane": "aeroplane"}
    columns = class_columns(dict(enumerate(["wall", *(renamed.get(name, name) for name in CLASSES)])), "x")
    assert columns == {i + 1: name for i, name in enumerate(CLASSES)}


def test_a_detector_without_one_of_the_classes_is_refused_by_name(tmp_path):
    names = ["brocolli" if name == "broccoli" else name for name in CLASSES]
    mask2former(tmp_path, names)
    with pytest.raises(UserError, match=r"79 of COCO's 80 classes, not 'broccoli' .did you mean 'brocolli'"):
        Mask2Former(tmp_path)


def test_folders_that_hold_no_detector_are_refused_with_the_mend(tmp_path, place):
    with pytest.raises(
        UserError, match=r"no Mask2Former in .*hf download facebook/mask2former-swin-small-coco-instance"
    ):
        Mask2Former(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text((place / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors"):
        Mask2Former(tmp_path)
    with pytest.raises(UserError, match="--device nothing"):
        Mask2Former(place, device="nothing")


def test_weights_with_a_part_missing_are_refused_and_not_made_up(tmp_path, place):
    state = load_file(place / "model.safetensors")
    state.pop("class_predictor.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((place / "config.json").read_text())
    with pytest.raises(UserError, match="not a whole Mask2Former"):
        Mask2Former(tmp_path)


@pytest.mark.parametrize("package", ["transformers", "scipy"])
def test_a_package_that_is_not_installed_is_named(monkeypatch, place, package):
    monkeypatch.setattr(detection, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(UserError, match=f"pip install {package}"):
        Mask2Former(place)


def test_weights_of_another_network_are_refused(tmp_path):
    clip(tmp_path)
    with pytest.raises(UserError, match=r"--detector: .* holds a model of type clip, not mask2former"):
        Mask2Former(tmp_path)


def test_colours_are_transformers_zero_shot_on_openais_preprocessing(colors):
    """Seventeen objects in one image, more than a pass holds, against CLIPModel, CLIPTokenizer and torchvision."""
    judge, folder = colors
    model, tokens = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    objects = Instances(np.asarray([[i, i, i + 30 + i, i + 40, 0.9] for i in range(17)], np.float32))
    image = picture(100, 90)
    cut = [image.crop((i, i, i + 30 + i, i + 40)) for i in range(17)]

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    with torch.no_grad():
        texts = []
        for color in COLORS:
            said = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
            ids = tokens(said, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
            projected = model.text_projection(model.text_model(**ids).pooler_output)
            texts.append(unit(unit(projected).mean(0)))
        pixels = torch.stack([OPENAI(crop) for crop in cut])
        seen = unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))
    assert torch.allclose(judge.texts("dog"), torch.stack(texts), atol=1e-5)
    cosines = seen @ torch.stack(texts).T
    assert judge(image, objects, "dog") == [COLORS[i] for i in cosines.argmax(1)]


@pytest.mark.parametrize("size", [(40, 40), (41, 60), (90, 33), (7, 12), (3, 50), (16, 16)])
def test_clips_pixels_are_those_of_torchvision(size):
    assert torch.equal(clip_pixels(picture(*size), 16), OPENAI(picture(*size)))


def test_a_crop_is_its_box_with_grey_outside_the_mask():
    mask = np.zeros((1, 60, 80), bool)
    mask[0, 10:20, 30:50] = True
    mask[0, 10:12, 30:33] = False
    image = picture()
    crop = np.asarray(crops(image, Instances(np.asarray([[30, 10, 50, 20, 1]], np.float32), mask))[0])
    whole = np.asarray(image)[10:20, 30:50]
    assert crop.shape == (10, 20, 3)
    assert (crop[:2, :3] == 0x99).all()
    assert np.array_equal(crop[2:], whole[2:]) and np.array_equal(crop[:2, 3:], whole[:2, 3:])


def test_a_box_thinner_than_a_pixel_is_shown_as_one(colors):
    thin = Instances(np.asarray([[5.2, 5.2, 5.4, 30.0, 1]], np.float32))
    assert crops(picture(), thin)[0].size == (1, 25)
    assert colors[0](picture(), thin, "cat")[0] in COLORS


def test_a_folder_without_clip_is_refused_with_the_mend(tmp_path):
    with pytest.raises(UserError, match=r"--clip: .*hf download openai/clip-vit-large-patch14"):
        ClipColors.at(tmp_path / "nowhere")


def _mmdet():
    """A cat at .9 and one at .2, a dog at .5, with masks: mmdet 2.x's answer, and 3.x's to the same image."""
    boxes = [np.zeros((0, 5), np.float32) for _ in CLASSES]
    masks: list[list[np.ndarray]] = [[] for _ in CLASSES]
    cat, dog = CLASSES.index("cat"), CLASSES.index("dog")
    boxes[cat] = np.asarray([[0, 0, 4, 4, 0.9], [1, 1, 2, 2, 0.2]], np.float32)
    boxes[dog] = np.asarray([[5, 5, 9, 9, 0.5]], np.float32)
    masks[cat], masks[dog] = [np.ones((9, 9), bool), np.zeros((9, 9), bool)], [np.eye(9, dtype=bool)]

    class Found(SimpleNamespace):
        def cpu(self):
            return self

        def __contains__(self, name):
            return hasattr(self, name)

    flat = torch.from_numpy(np.concatenate([boxes[dog], boxes[cat]]))
    found = Found(bboxes=flat[:, :4], scores=flat[:, 4], labels=torch.tensor([dog, cat, cat]))
    found.masks = torch.from_numpy(np.stack([*masks[dog], *masks[cat]]))
    return boxes, masks, SimpleNamespace(pred_instances=found)


def test_mmdets_answers_of_both_kinds_become_the_same_detections():
    boxes, masks, sample = _mmdet()
    for result in ((boxes, masks), sample):
        found = from_mmdet(result, least=0.2)
        assert set(found) == {"cat", "dog"}
        assert found["cat"].boxes.tolist() == [pytest.approx([0, 0, 4, 4, 0.9])]  # .2 is not above .2
        assert found["cat"].masks.all() and np.array_equal(found["dog"].masks[0], np.eye(9, dtype=bool))
    assert from_mmdet(boxes)["cat"].masks is None
    assert len(from_mmdet(boxes)["cat"]) == 2
