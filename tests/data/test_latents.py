"""Cached latents and embeddings: the rows of the encoders, without the encoders, also after a stop in the middle."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.data import latents
from fewstep.data.encoded import Encoded, dressed, plain
from fewstep.data.registry import make_source
from fewstep.draws import Draw
from fewstep.engine.feed import Feed
from fewstep.errors import RunFailed, UserError
from tests.data.known_encoders import Around
from tests.data.tiny_captions import tiny_captions
from tests.data.tiny_shards import tiny_shards
from tests.engine import toy
from tests.models.tiny_sd import tiny_sd


class Encoders(Around):
    """Counts the pictures that are encoded, and can be let go of."""

    def __init__(self, key="k"):
        super().__init__(key)
        self.pictures, self.asked = 0, []

    def encode(self, images, noise=None):
        self.pictures += len(images)
        return super().encode(images, noise)

    def null(self, cond):
        self.asked.append("null")
        return cond

    def release(self):
        self.asked.append("release")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "ROWS", 3)
    monkeypatch.setattr(latents, "AT_ONCE", 2)


@pytest.fixture
def folder(tmp_path):
    return tiny_captions(tmp_path / "pictures")


def _cached(folder, around=None, **more):
    said = {"source": "captions", "path": str(folder), "size": 16, "cache": str(folder.parent / "cache"), **more}
    source = make_source(said)
    handle = type("Handle", (), {"around": around or Encoders()})
    return dressed({"train": source}, {"student": handle})["train"]


def _shards(folder):
    return sorted((folder.parent / "cache").glob("*/*.safetensors"))


@pytest.mark.parametrize("flip", [False, True])
def test_rows_are_those_of_the_encoders(folder, flip):
    """x0 = mean + std n with the same n, of mirrored pictures as well: only the order of sums differs."""
    cached = _cached(folder, flip=flip)
    live, ids = Encoded(plain(cached), Around()), torch.tensor([5, 0, 7, 7])
    assert type(cached).__name__ == "Cached" and cached.row_shape == live.row_shape == (3, 8, 8)
    for draw in (lambda: None, lambda: Draw(1, 2, np.arange(4)), lambda: Draw(1, 3, np.arange(4))):
        rows, expected = cached.fetch(ids, draw()), live.fetch(ids, draw())
        torch.testing.assert_close(rows["x0"], expected["x0"], rtol=0, atol=1e-6)
        assert torch.equal(rows["cond"]["prompt_embeds"], expected["cond"]["prompt_embeds"])
        assert rows["prompt"] == expected["prompt"] and rows.keys() == expected.keys()


def test_buckets_are_cached_in_their_sizes_and_as_squares(tmp_path):
    from PIL import Image

    folder = tmp_path / "shapes"
    folder.mkdir()
    for i, shape in enumerate([(16, 16), (10, 20), (20, 10), (10, 21)]):
        noise = np.random.default_rng(i).integers(0, 255, (*shape, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    cached = _cached(folder, buckets=True, multiple=4, flip=True)
    live = Encoded(plain(cached), Around())
    for ids, draw in ([0, 1, 2, 3], None), ([1, 3], 1), ([2, 2], 1), ([0], 1):
        address = [None if draw is None else Draw(4, 0, np.arange(len(ids))) for _ in range(2)]
        rows, expected = (s.fetch(torch.tensor(ids), a)["x0"] for s, a in zip((cached, live), address))
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-6)
    assert Feed(cached, "train", 0, batch=1).per_epoch == 4
    with pytest.raises(UserError, match="cannot stand in one batch"):
        cached.fetch(torch.arange(2), Draw(0, 0, np.arange(2)))


def test_everything_is_encoded_once_and_the_encoders_are_let_go_of(folder):
    first, second = Encoders(), Encoders()
    rows = _cached(folder, first).fetch(torch.arange(8), None)
    assert first.pictures == 2 * 8  # mean and standard deviation
    assert sorted(first.texts) == sorted([text] for text in set(rows["prompt"]))
    assert first.asked == ["null", "release"]
    again = _cached(folder, second)
    assert torch.equal(again.fetch(torch.arange(8), None)["x0"], rows["x0"])
    assert torch.equal(
        again.fetch(torch.arange(8), Draw(0, 0, np.arange(8)))["cond"]["prompt_embeds"], rows["cond"]["prompt_embeds"]
    )
    assert (second.pictures, second.texts, second.asked) == (0, [], ["null", "release"])


def test_nothing_is_encoded_before_the_first_fetch(folder):
    around = Encoders()
    cached = _cached(folder, around)
    assert (len(cached), around.pictures, _shards(folder)) == (8, 0, [])


def test_a_stop_in_the_middle_keeps_the_shards_that_are_whole(folder):
    whole = _cached(folder).fetch(torch.arange(8), None)
    assert len(_shards(folder)) == 3
    _shards(folder)[1].unlink()
    around = Encoders()
    rows = _cached(folder, around).fetch(torch.arange(8), None)
    assert around.pictures == 2 * 3
    assert torch.equal(rows["x0"], whole["x0"])


def test_equal_texts_of_a_shard_are_kept_once(folder, tmp_path):
    for file in folder.glob("*.png"):
        file.with_suffix(".txt").write_text("the same")
    (folder / "metadata.jsonl").unlink()
    cached = _cached(folder)
    assert cached.fetch(torch.tensor([7, 1]), None)["cond"]["prompt_embeds"].shape == (2, 12, 1)
    assert [name for name in load_file(_shards(folder)[0]) if name.startswith("prompt_embeds")] == ["prompt_embeds 0"]


@pytest.mark.parametrize(
    "change", [{"size": 8}, {"flip": True}, {"cache_dtype": "bfloat16"}, {"around": Encoders("other")}]
)
def test_what_is_kept_is_keyed_by_all_that_it_depends_on(folder, change):
    _cached(folder).fetch(torch.arange(1), None)
    around = Encoders()
    _cached(folder, around).fetch(torch.arange(1), None)
    assert around.pictures == 0
    other = {"around": Encoders(), **change}
    _cached(folder, **other).fetch(torch.arange(1), None)
    assert other["around"].pictures > 0
    assert len(_shards(folder)) == 6


def test_other_pictures_have_another_cache(folder):
    _cached(folder).fetch(torch.arange(1), None)
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes())
    cached = _cached(folder)
    assert torch.equal(*cached.fetch(torch.arange(2), None)["x0"].unbind())


def test_half_precision_is_kept_in_half_the_space_and_served_in_float32(folder):
    rows, half = (_cached(folder, **more).fetch(torch.arange(8), None) for more in ({}, {"cache_dtype": "bfloat16"}))
    assert half["x0"].dtype == half["cond"]["prompt_embeds"].dtype == torch.float32
    torch.testing.assert_close(half["x0"], rows["x0"], rtol=2**-8, atol=0)
    large, small = (
        sum(t.nbytes for n, t in load_file(f).items() if n != "texts")
        for f in (
            next(f for f in _shards(folder) if dtype in {t.dtype for t in load_file(f).values()})
            for dtype in (torch.float32, torch.bfloat16)
        )
    )
    assert large == 2 * small


def test_prompts_alone_are_cached_as_well_and_padded_to_the_longest(tmp_path):
    class Longs(Encoders):
        def prompts(self, texts):
            self.texts.append(texts)
            value = torch.arange(1.0, len(texts[0]) + 1)[None, :, None]
            cond = {"prompt_embeds": value, "mask": torch.ones(1, len(texts[0]), dtype=torch.bool)}
            return latents.Cond(**cond, pooled=torch.full((1, 4), 0.1))

    (tmp_path / "prompts.txt").write_text("a\nbcd\na\nef\n")
    said = {"source": "prompts", "path": str(tmp_path / "prompts.txt"), "cache": str(tmp_path / "cache")}
    source, around = make_source({**said, "cache_dtype": "bfloat16"}), Longs()
    handle = type("Handle", (), {"around": around})
    cached = dressed({"train": source}, {"student": handle})["train"]
    rows = cached.fetch(torch.tensor([0, 3, 1]), Draw(0, 0, np.arange(3)))
    assert rows["cond"]["prompt_embeds"][:, :, 0].tolist() == [[1, 0, 0], [1, 2, 0], [1, 2, 3]]
    assert rows["cond"]["mask"].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert torch.equal(rows["cond"]["pooled"], torch.full((3, 4), 0.1))  # no sequence: exact
    assert rows["prompt"] == ["a", "ef", "bcd"] and cached.row_shape is None
    assert sorted(around.texts) == [["a"], ["bcd"], ["ef"]]


def test_shards_of_tars_are_cached_like_folders(tmp_path):
    packed = tiny_shards(tmp_path / "packed")
    said = {"source": "webdataset", "path": str(packed), "size": 16, "cache": str(tmp_path / "cache")}
    handle = type("Handle", (), {"around": Encoders()})
    cached = dressed({"train": make_source(said)}, {"student": handle})["train"]
    live = Encoded(plain(cached), Around())
    rows, expected = (s.fetch(torch.tensor([6, 1]), Draw(0, 0, np.arange(2))) for s in (cached, live))
    torch.testing.assert_close(rows["x0"], expected["x0"], rtol=0, atol=1e-6)


def test_processes_begin_at_different_shards_and_each_ends_with_all(monkeypatch):
    orders = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        orders.append(latents._shared_out(7))
    assert [order[:2] for order in orders] == [[0, 3], [1, 4], [2, 5]]
    assert all(sorted(order) == list(range(7)) for order in orders)


def test_a_damaged_shard_and_a_disk_that_refuses_are_named(folder, tmp_path):
    _cached(folder).fetch(torch.arange(1), None)
    _shards(folder)[0].write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot read the cache '.*000000\.safetensors'.* remove the file"):
        _cached(folder).fetch(torch.arange(1), None)
    (tmp_path / "file").touch()
    with pytest.raises(RunFailed, match="cannot write the cache"):
        _cached(folder, cache=str(tmp_path / "file")).fetch(torch.arange(1), None)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


def _recipe(pipeline, folder, **data):
    said = {"source": "captions", "path": str(folder), "size": 16, "flip": True, **data}
    train = {"steps": 4, "batch": 2, "log_every": 1, "check_export": False}
    return {"method": "toy_denoise", "student": {"from": str(pipeline)}, "data": {"train": said}, "train": train}


def test_a_run_on_cached_rows_is_the_run_and_resumes_bit_for_bit(pipeline, folder, tmp_path):
    cache = {"cache": str(tmp_path / "kept")}
    live = toy.trained(_recipe(pipeline, folder), tmp_path / "live")
    cached = toy.trained(_recipe(pipeline, folder, **cache), tmp_path / "cached")
    assert toy.largest_difference(live, cached) < 1e-5
    recipe = _recipe(pipeline, folder, **cache)
    toy.trained({**recipe, "train": {**recipe["train"], "steps": 2}}, tmp_path / "halves")
    resumed = toy.trained(recipe, tmp_path / "halves", resume=True)
    assert toy.hashes(resumed) == toy.hashes(cached)
    assert "vae" not in resumed.handles["student"].around._loaded


def test_a_latent_student_trains_on_buckets_and_resumes_bit_for_bit(pipeline, tmp_path):
    from PIL import Image

    folder = tmp_path / "shapes"
    folder.mkdir()
    for i in range(8):
        shape = [(32, 32, 3), (16, 32, 3)][i % 2]
        Image.fromarray(np.random.default_rng(i).integers(0, 255, shape, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"number {i}")
    recipe = _recipe(pipeline, folder, size=32, buckets=True, multiple=8)
    whole = toy.trained(recipe, tmp_path / "whole")
    toy.trained({**recipe, "train": {**recipe["train"], "steps": 2}}, tmp_path / "halves")
    assert toy.hashes(toy.trained(recipe, tmp_path / "halves", resume=True)) == toy.hashes(whole)
