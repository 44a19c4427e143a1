"""masked_lm and text_classify, which make the teachers of the language methods (BERT, arXiv 1810.04805)."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fewstep.draws import Draw
from fewstep.engine.exporting import export_run
from fewstep.errors import UserError
from fewstep.methods.language.text_classify import classifier, scores
from fewstep.models.text_encoder import read, word_embeddings

from . import language

pytestmark = pytest.mark.usefixtures("cache")


def test_hiding_follows_the_shares_and_leaves_special_tokens_alone(world: Path, tmp_path: Path) -> None:
    method = language.bound(language.recipe(world, "masked_lm"), tmp_path / "run")
    source = method.sources["train"]
    ids = torch.arange(8100) % len(source)
    tokens, mask = source.tokens[ids].long(), source.mask[ids]
    shown, guessed = method.hide(tokens, mask, source, Draw(0, 0, range(8100)))
    words = source.words
    candidates = mask & ~torch.isin(tokens, torch.tensor(words.special))
    assert not (guessed & ~candidates).any() and torch.equal(shown[~guessed], tokens[~guessed])

    def near(share: float, count: int, of: int) -> bool:
        return abs(count / of - share) < 4 * (share * (1 - share) / of) ** 0.5  # four standard errors

    n = int(guessed.sum())
    assert near(0.15, n, int(candidates.sum()))
    masked = (shown == words.mask) & guessed
    same = (shown == tokens) & guessed
    chance = 0.1 / words.size  # a random word may be the mask, or the word itself
    assert near(0.8 + chance, int(masked.sum()), n) and near(0.1 + chance, int(same.sum()), n)
    assert set(shown[guessed & ~masked & ~same].tolist()) > set(range(words.mask + 1, words.size))  # of all words


def test_the_masked_word_loss_is_cross_entropy_over_the_vocabulary(world: Path, tmp_path: Path) -> None:
    method = language.bound(language.recipe(world, "masked_lm"), tmp_path / "run")
    batch = language.rows(method, "train", 8)
    draws = (Draw(0, 0, range(8)) for _ in range(2))
    update = language.step(method, "train", batch, next(draws))
    shown, guessed = method.hide(batch.tokens, batch.mask, method.sources["train"], next(draws))
    logits = method.head(read(method.student, shown, batch.mask).hidden[-1], word_embeddings(method.student.module))
    target = batch.tokens.masked_fill(~guessed, -100)
    assert guessed.any()
    torch.testing.assert_close(
        language.terms(update)["masked_word"], F.cross_entropy(logits.flatten(0, 1), target.flatten())
    )


def test_words_become_easier_to_guess_and_the_bare_encoder_is_exported(world: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    said = language.recipe(world, "masked_lm", train={"steps": 60, "batch": 32, "log_every": 1})
    for role in ("student", "head"):
        said[role] = {**said[role], "optimizer": {"lr": 1e-2}}
    trainer = language.trained(said, tmp_path / "run")
    losses = [
        json.loads(line)["loss.masked_word"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    folder = export_run(trainer)
    assert folder is not None
    module, words = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert set(module.state_dict()) == set(trainer.handles["student"].module.state_dict())
    assert words.mask_token_id == trainer.sources["train"].words.mask


def test_a_classifier_finetuned_from_a_folder_learns_its_labels_and_serves_as_teacher(
    world: Path, tmp_path: Path
) -> None:
    said = language.recipe(
        world, "text_classify", config={"classes": 3}, train={"steps": 60, "batch": 27, "log_every": 1}
    )
    said |= {
        "student": {"from": str(world / "pretrained"), "optimizer": {"lr": 1e-2}},
        "head": {"optimizer": {"lr": 1e-2}},
    }
    trainer = language.trained({**said, "validate": {"every": 60, "source": "train", "n": 81}}, tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation.accuracy"] > 0.9
    folder = export_run(trainer)
    tiny = language.recipe(world, finetuned=str(folder))
    assert language.trained(tiny, tmp_path / "ernie").total == 8


def test_unlabelled_rows_neither_train_nor_count(world: Path, tmp_path: Path) -> None:
    method = language.bound(language.recipe(world, "text_classify", config={"classes": 3}), tmp_path / "run")
    batch = language.rows(method, "train", 6)
    batch.fields["labels"][3:] = -100
    half = language.terms(language.step(method, "train", batch))["hard"]
    first = language.terms(language.step(method, "train", language.rows(method, "train", 3)))["hard"]
    torch.testing.assert_close(half, first)
    assert len(method.validation(batch)["accuracy"]) == 3


def test_a_number_is_predicted_by_squared_error(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.tsv"
    file.write_text("1.5\tthe cat eats in a lake\n-0.5\tthe owl leaves the old tree\n")
    said = language.recipe(world, "text_classify", config={"classes": 1})
    said["data"]["train"] |= {"path": str(file), "regression": True}
    method = language.bound(said, tmp_path / "run")
    batch = language.rows(method, "train", 2)
    z = method.head(read(method.student, batch.tokens, batch.mask).pooled)[:, 0]
    expected = ((z - torch.tensor([1.5, -0.5])) ** 2).mean()
    torch.testing.assert_close(language.terms(language.step(method, "train", batch))["hard"], expected)
    assert set(scores(z[:, None], batch.labels)) == {"squared_error"}


def test_a_new_classifier_is_small_and_the_number_of_classes_is_checked(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = classifier(300, 40)
    assert abs(head.weight.std().item() - 0.02) < 0.001 and not head.bias.any()
    with pytest.raises(UserError, match="has 3 classes and the classifier 2"):
        language.bound(language.recipe(world, "text_classify"), tmp_path / "run")
