"""Pictures and prompts as latents and embeddings: with encoders whose answers are known, and in front of the trainer."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fewstep.data import encoded
from fewstep.data.encoded import Encoded, dressed, plain
from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.engine.feed import Feed, Feeds
from fewstep.engine.offline import stage_key
from fewstep.errors import UserError
from fewstep.recipe import load_recipe
from tests.data.known_encoders import STD, Around
from tests.data.tiny_captions import tiny_captions
from tests.engine import toy
from tests.models.tiny_sd import tiny_sd


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_captions(tmp_path_factory.mktemp("captions") / "pictures")


@pytest.fixture
def captions(folder):
    return make_source({"source": "captions", "path": str(folder), "size": 16})


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    return make_source({"source": "prompts", "path": str(tmp_path / "prompts.txt")})


def _handles(around=None):
    return {"student": SimpleNamespace(around=None), "teacher": SimpleNamespace(around=around)}


def test_without_a_draw_latents_are_the_posteriors_mean(captions):
    ids, around = torch.tensor([5, 0]), Around()
    rows = Encoded(captions, around).fetch(ids, None)
    assert torch.equal(rows["x0"], nn.functional.avg_pool2d(captions.fetch(ids, None)["x0"], 2))
    assert rows["prompt"] == ["digit five", "digit zero"]
    assert rows.keys() == {"x0", "cond", "prompt"}
    assert rows["cond"]["prompt_embeds"][:, 6, 0].tolist() == [ord("f"), ord("z")]


def test_with_a_draw_latents_are_samples_with_the_noise_of_their_address(captions):
    """x0 = mean + std n, n = normal(seed, step, slot, "vae"): whatever rows are fetched beside it."""
    source, ids = Encoded(captions, Around()), torch.arange(8)
    mean = source.fetch(ids, None)["x0"]
    whole = source.fetch(ids, Draw(3, 5, np.arange(8)))["x0"]
    part = source.fetch(ids[2:6], Draw(3, 5, np.arange(2, 6)))["x0"]
    noise = Draw(3, 5, np.arange(8)).normal("vae", 3, 8, 8)
    assert torch.allclose((whole - mean) / STD, noise, atol=1e-4)
    assert torch.equal(whole[2:6], part)
    assert not torch.equal(source.fetch(ids, Draw(3, 6, np.arange(8)))["x0"], whole)


def test_nothing_that_is_fetched_has_a_graph(captions):
    source = Encoded(captions, Around())
    rows = source.fetch(torch.arange(2), Draw(0, 0, np.arange(2)))
    assert not rows["x0"].requires_grad
    assert not rows["cond"]["prompt_embeds"].requires_grad


def test_the_shape_of_a_row_is_that_of_a_latent(captions, prompts):
    assert Encoded(captions, Around()).row_shape == (3, 8, 8)
    assert Encoded(prompts, Around()).row_shape is None


def test_prompts_alone_gain_embeddings_and_no_latents(prompts):
    rows = Encoded(prompts, Around()).fetch(torch.arange(3), Draw(0, 0, np.arange(3)))
    assert rows.keys() == {"cond", "prompt"}
    assert torch.equal(rows["cond"]["prompt_embeds"][0], rows["cond"]["prompt_embeds"][2])


def test_every_text_is_embedded_once_and_alone(captions, prompts):
    """So no embedding depends on its neighbours in a batch, nor a resumed run on what was remembered."""
    around = Around()
    source = Encoded(prompts, around)
    source.fetch(torch.arange(3), None)
    source.fetch(torch.arange(3), None)
    assert around.texts == [["a cat"], ["a dog"]]


def test_what_is_remembered_is_bounded_and_the_oldest_goes(captions, monkeypatch):
    monkeypatch.setattr(encoded, "REMEMBERED", 2)
    around = Around()
    source = Encoded(captions, around)
    rows = source.fetch(torch.arange(4), None)
    assert rows["cond"]["prompt_embeds"].shape == (4, 12, 1)
    around.texts.clear()
    source.fetch(torch.tensor([3, 2, 0, 3]), None)
    assert around.texts == [["digit zero"]]


def test_sources_with_prompts_or_pictures_are_dressed_and_all_others_left_alone(captions, prompts):
    labels = make_source({"source": "labels", "classes": 3})
    found = dressed({"train": captions, "prompts": prompts, "labels": labels}, _handles(Around()))
    assert {name: type(source) for name, source in found.items()} == {
        "train": Encoded,
        "prompts": Encoded,
        "labels": type(labels),
    }
    assert plain(found["train"]) is captions
    assert plain(found["labels"]) is labels
    untouched = dressed({"train": captions}, _handles())
    assert untouched == {"train": captions}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"source": "image_folder", "size": 16}, "ImageFolder has no captions, but the network reads prompts"),
        ({"source": "digits"}, r"Digits has images of 1 channel\(s\), but the VAE reads 3"),
    ],
)
def test_pictures_that_a_text_to_image_network_cannot_read_are_refused_with_the_mend(folder, said, words):
    path = {"path": str(folder)} if "size" in said else {}
    source = dressed({"train": make_source({**said, **path})}, _handles(Around()))["train"]
    with pytest.raises(UserError, match=words) as caught:
        source.fetch(torch.arange(2), Draw(0, 0, np.arange(2)))
    assert "{source: captions, path: FOLDER, size: N}" in str(caught.value)


def test_content_keys_follow_the_source_and_the_encoders(captions, prompts):
    keys = {Encoded(source, Around(key)).content_key() for source in (captions, prompts) for key in ("k", "other")}
    assert len(keys | {captions.content_key()}) == 5
    assert Encoded(captions, Around()).content_key() == Encoded(captions, Around()).content_key()


def test_a_feed_serves_prompts_beside_their_rows_also_of_several_sources(captions, prompts):
    sources = dressed({"train": captions, "asked": prompts}, _handles(Around()))
    feeds = Feeds({name: Feed(source, name, seed=0, batch=2) for name, source in sources.items()})
    batch = feeds.batch({name: feed.next() for name, feed in feeds.items()}, Draw(0, 0, np.arange(2))).to("cpu")
    for rows, source in ((batch.train, captions), (batch.asked, prompts)):
        assert rows.prompt == [source.prompts[i] for i in rows.ids.tolist()]
        letters = [[float(ord(c)) for c in text.ljust(12)[:12]] for text in rows.prompt]
        assert rows.cond["prompt_embeds"][:, :, 0].tolist() == letters
    assert batch.train.x0.shape == (2, 3, 8, 8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


def _recipe(pipeline, folder, **train):
    data = {"source": "captions", "path": str(folder), "size": 16, "flip": True}
    sizes = {"steps": 4, "batch": 4, "log_every": 1, "check_export": False, **train}
    return {"method": "toy_denoise", "student": {"from": str(pipeline)}, "data": {"train": data}, "train": sizes}


def test_a_latent_student_trains_on_captions_and_is_validated_and_shown_in_pixels(pipeline, folder, tmp_path):
    said = _recipe(pipeline, folder)
    said |= {"validate": {"every": 4, "n": 8, "metrics": ["high_frequency"]}, "preview": {"every": 4, "n": 4}}
    trainer = toy.trained(said, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len([line["loss.denoise"] for line in lines if "loss.denoise" in line]) == 4
    assert next(line["validation.high_frequency"] for line in lines if "validation.high_frequency" in line) > 0
    with Image.open(tmp_path / "previews" / "step-000004.png") as shown:
        assert (shown.mode, shown.size) == ("RGB", (10 * 50, 50))  # ten columns of 16 pixels, enlarged threefold
    encoders = trainer.handles["student"].around.parts()
    assert all(p.grad is None for part in (encoders["vae"], encoders["text_encoder"]) for p in part.parameters())


def test_latents_and_embeddings_are_those_of_the_stock_pipeline(pipeline, folder, captions, tmp_path):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(pipeline, use_safetensors=True)
    source = toy.Trainer(load_recipe(_recipe(pipeline, folder)), tmp_path / "run", show=False).sources["train"]
    rows, pixels = source.fetch(torch.arange(3), None), captions.fetch(torch.arange(3), None)
    with torch.no_grad():
        latents = stock.vae.encode(pixels["x0"]).latent_dist.mean * stock.vae.config.scaling_factor
        embeds, _ = stock.encode_prompt(pixels["prompt"], "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(rows["x0"], latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows["cond"]["prompt_embeds"], embeds, rtol=0, atol=1e-5)
    assert not torch.allclose(embeds[0], embeds[1]), "the captions were to differ within the tokenizer's length"


def test_a_resumed_latent_run_is_the_run_bit_for_bit(pipeline, folder, tmp_path):
    """2 + 2 steps = 4 steps, with flips, sampled posteriors, and embeddings that the second half makes anew."""
    whole = toy.trained(_recipe(pipeline, folder), tmp_path / "whole")
    halves = toy.Trainer(load_recipe(_recipe(pipeline, folder, save_every=2)), tmp_path / "halves", show=False)
    save = halves.save

    def stop_after_the_first_save():
        save()
        raise KeyboardInterrupt

    halves.save = stop_after_the_first_save
    with pytest.raises(KeyboardInterrupt):
        halves.run()
    resumed = toy.trained(_recipe(pipeline, folder, save_every=2), tmp_path / "halves", resume=True)
    assert toy.hashes(resumed) == toy.hashes(whole)


def test_four_micro_batches_of_latents_equal_one(pipeline, folder, tmp_path):
    one = toy.trained(_recipe(pipeline, folder), tmp_path / "one")
    four = toy.trained(_recipe(pipeline, folder, micro_batch=1), tmp_path / "four")
    assert four.cut.parts == 4
    assert toy.largest_difference(one, four) < 1e-5


def test_an_offline_stage_has_one_key_before_and_after_its_sources_are_dressed(pipeline, folder, captions):
    recipe = load_recipe(_recipe(pipeline, folder))
    stage = recipe.build_method().stages()[0]
    found = dressed({"train": captions}, _handles(Around()))
    assert stage_key(stage, recipe, found) == stage_key(stage, recipe, {"train": captions})
