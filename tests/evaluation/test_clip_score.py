"""CLIP score: three conventions, three back ends with one set of weights, and the vocabulary that needs no network."""

import builtins
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from fewstep.errors import UserError
from fewstep.evaluation.clip_score import CONVENTIONS, clip_score, pillow_pixels
from fewstep.rewards.pixels import MEAN, STD
from tests.rewards.tiny import clip as tiny_clip
from tests.rewards.tiny import randomise, to_open_clip

WIDTH, SIZE, WORDS, LENGTH = 64, 16, 49408, 77  # 64 to a head, as clip-anytorch counts heads
PROMPTS = ["a cat on a mat", "Ein Würfel, rot!"]
LONG = "an exceptionally long description of nothing " * 30


def _images(n=2, height=24, width=20):
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformers folder of a random CLIP, its tokenizer of single letters."""
    place = tmp_path_factory.mktemp("tiny")
    tiny_clip(place)
    return str(place)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """One random CLIP with OpenAI's vocabulary in the forms of all three back ends: {back end: place}."""
    clip = pytest.importorskip("clip")
    pytest.importorskip("open_clip")
    root = tmp_path_factory.mktemp("three")
    both = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 1}
    ends = {"bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1}
    text = {**both, "vocab_size": WORDS, "max_position_embeddings": LENGTH, **ends}
    vision = {**both, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    randomise(model)
    model.save_pretrained(root / "transformers")
    _vocabulary(clip.clip._tokenizer, root / "transformers")
    state = to_open_clip({k: v for k, v in model.state_dict().items() if "position_ids" not in k})
    save_file(state, root / "clip.safetensors")
    _open_clip_folder(state, root / "open_clip")
    return {name: str(root / name) for name in ("transformers", "open_clip")} | {"clip": str(root / "clip.safetensors")}


def _vocabulary(tokenizer, folder):
    """The vocabulary that clip-anytorch ships, as files of transformers."""
    (folder / "vocab.json").write_text(json.dumps(tokenizer.encoder))
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def _open_clip_folder(state, folder):
    folder.mkdir()
    vision = {"image_size": SIZE, "layers": 2, "width": WIDTH, "head_width": WIDTH, "patch_size": 8}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": WIDTH, "heads": 1, "layers": 2}
    sizes = {"embed_dim": 8, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    save_file(state, folder / "open_clip_model.safetensors")


def _values(backend, place, prompts, **options):
    return clip_score({"backend": backend, "from": place, **options}).values(_images(len(prompts)), prompts, None)


def test_the_conventions_differ_by_100_and_by_two_and_a_half():
    cosines = torch.tensor([0.3, -0.1])
    assert CONVENTIONS["cosine"](cosines).tolist() == pytest.approx([0.3, -0.1])
    assert CONVENTIONS["percent"](cosines).tolist() == pytest.approx([30.0, 0.0])
    assert CONVENTIONS["clipscore"](cosines).tolist() == pytest.approx([0.75, 0.0])


def test_a_convention_is_part_of_the_scores_name(folder):
    names = [clip_score({"from": folder, "convention": c}).name for c in CONVENTIONS]
    assert names == ["clip_score.cosine", "clip_score.percent", "clip_score.clipscore"]


def test_clipscore_alone_puts_its_words_before_the_prompt(folder):
    def of(**options):
        return clip_score({"from": folder, **options}).values(_images(), PROMPTS, None)

    assert torch.allclose(of(convention="percent"), 100 * of().clamp(min=0), atol=1e-5)
    said = of(prefix="A photo depicts ")
    assert not torch.allclose(said, of())
    assert torch.allclose(of(convention="clipscore"), 2.5 * said.clamp(min=0), atol=1e-6)
    assert torch.allclose(of(convention="clipscore", prefix=""), 2.5 * of().clamp(min=0), atol=1e-6)
    assert "'A photo depicts ' + prompt" in clip_score({"from": folder, "convention": "clipscore"}).tool.resize


def test_all_back_ends_give_one_value_for_one_set_of_weights(weights):
    found = {name: _values(name, place, [*PROMPTS, LONG]) for name, place in weights.items()}
    assert found["clip"].std() > 0.02  # the pairs differ for it, so agreement means something
    assert torch.allclose(found["clip"], found["open_clip"], atol=1e-5)
    assert torch.allclose(found["clip"], found["transformers"], atol=1e-5)


def test_another_back_end_is_another_instrument(weights):
    tools = {name: clip_score({"backend": name, "from": place}).tool for name, place in weights.items()}
    assert {tool.impl for tool in tools.values()} == {"clip-anytorch", "open_clip_torch", "transformers"}


@pytest.mark.parametrize("backend", ["transformers", "open_clip", "clip"])
def test_long_prompts_are_cut_and_not_dropped(weights, backend):
    long, longer, other = (_values(backend, weights[backend], [p]) for p in (LONG, LONG + LONG, "b " + LONG))
    assert torch.equal(long, longer)
    assert not torch.equal(long, other)


@pytest.mark.parametrize("caption", ["a dog", "2 dogs, running", " 'quoted' start", LONG])
def test_words_before_a_prompt_are_three_tokens_spliced_in_behind_the_start(caption):
    """DMD2's evaluator splices ids; with OpenAI's vocabulary the text itself gives the same ones, cut at 77."""
    clip = pytest.importorskip("clip")
    spliced = clip.clip._tokenizer.encode("A photo depicts")
    alone = clip.clip._tokenizer.encode(caption)
    start, end = WORDS - 2, WORDS - 1
    want = [start, *spliced, *alone, end]
    want = [*want[: LENGTH - 1], end] if len(want) > LENGTH else want
    made = clip.tokenize([f"A photo depicts {caption}"], truncate=True)[0]
    assert len(spliced) == 3
    assert made[: len(want)].tolist() == want and not made[len(want) :].any()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 40), (33, 17), (8, 12)])
def test_pixels_are_those_of_clips_own_preprocessing(height, width):
    transforms = pytest.importorskip("torchvision.transforms")
    own = transforms.Compose(
        [
            transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = _images(2, height, width)
    want = torch.stack([own(Image.fromarray(np.ascontiguousarray(x.permute(1, 2, 0).numpy()))) for x in images])
    assert torch.allclose(pillow_pixels(images, SIZE), want, atol=1e-6)
    assert torch.equal(pillow_pixels(images[:, :1], SIZE), pillow_pixels(images[:, :1].repeat(1, 3, 1, 1), SIZE))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "ViT-B/33"}, "unknown model 'ViT-B/33'"),
        ({"model": "ViT-g-14"}, "clip_score.from: 'laion/CLIP-ViT-g-14-laion2B-s12B-b42K' is neither here"),
        ({"convention": "x100"}, "convention='x100'"),
        ({"backend": "openai"}, "backend='openai'"),
        ({"form": "x"}, "did you mean 'from'"),
    ],
)
def test_wrong_options_and_missing_weights_are_named(options, words):
    with pytest.raises(UserError) as caught:
        clip_score(options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_score_without_prompts_is_refused(folder):
    with pytest.raises(UserError, match="needs prompts"):
        clip_score({"from": folder}).values(_images(), None, None)


def test_weights_of_another_form_are_refused(weights, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds no CLIP under OpenAI's names"):
        clip_score({"backend": "clip", "from": str(tmp_path / "a.safetensors")})
    with pytest.raises(UserError, match="open_clip knows no model 'ViT-x'"):
        clip_score({"backend": "open_clip", "model": "ViT-x", "from": str(tmp_path / "a.safetensors")})
    sizes = Path(weights["open_clip"], "open_clip_config.json").read_text()
    (tmp_path / "open_clip_config.json").write_text(sizes)
    with pytest.raises(UserError, match="not the weights of this model"):
        clip_score({"backend": "open_clip", "from": str(tmp_path)})


def test_an_archive_that_openai_did_not_publish_is_never_opened(tmp_path):
    pytest.importorskip("clip")
    (tmp_path / "ViT-B-32.pt").write_bytes(b"anything that could run")
    with pytest.raises(UserError, match="none of OpenAI's archives"):
        clip_score({"backend": "clip", "from": str(tmp_path / "ViT-B-32.pt")})


def test_missing_weights_of_clip_anytorch_are_named_with_their_place(tmp_path, monkeypatch):
    pytest.importorskip("clip")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"no weights '.*\.cache/clip/ViT-L-14-336px\.pt' of ViT-L/14@336px"):
        clip_score({"backend": "clip", "model": "ViT-L/14@336px"})


@pytest.mark.parametrize(
    ("error", "mend"),
    [
        (ImportError("cannot import name 'packaging' from 'pkg_resources'"), r'pip install "setuptools<81'),
        (ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources"), r'pip install "setuptools<81'),
        (ModuleNotFoundError("No module named 'clip'", name="clip"), "pip install clip-anytorch"),
    ],
)
def test_a_setuptools_without_pkg_resources_is_told_from_a_missing_package(monkeypatch, error, mend):
    plain = builtins.__import__

    def broken(name, *rest, **options):
        if name == "clip":
            raise error
        return plain(name, *rest, **options)

    monkeypatch.delitem(sys.modules, "clip", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(UserError, match=mend):
        clip_score({"backend": "clip"})
