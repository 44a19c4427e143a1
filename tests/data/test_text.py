"""Text sources: what a row holds, packing, labels, augmentation by addressed draws, and tokenizers cached by content."""

from pathlib import Path

import pytest
import torch

from fewstep.data.registry import make_source
from fewstep.data.text import NO_LABEL, TextLabels, TextLines
from fewstep.data.tokenizer import TrainedTokenizer, tokenizer_of
from fewstep.draws import Draw
from fewstep.errors import UserError

LINES = ["the cat sat on the mat", "a dog ran after the cat", "the bird sang", "fish swim and birds fly over the sea"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/fewstep/tokenizers"


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(LINES) + "\n\n")
    return str(file)


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    file = tmp_path / "task.tsv"
    file.write_text("".join(f"{label}\t{line}\n" for label, line in zip(("beast", "beast", "bird", ""), LINES)))
    return str(file)


def said(corpus: str, vocab_size: int = 120) -> dict:
    return {"corpus": corpus, "vocab_size": vocab_size}


def test_a_row_is_cls_text_sep_padding_and_the_mask_covers_exactly_the_first_three(corpus: str) -> None:
    source = TextLines(path=corpus, tokenizer=said(corpus), length=16)
    rows, words = source.fetch(torch.arange(len(source)), None), source.words
    for tokens, mask, line in zip(rows["tokens"], rows["mask"], LINES):
        n = int(mask.sum())
        assert mask[:n].all() and not mask[n:].any() and (tokens[n:] == words.pad).all()
        assert tokens[0] == words.cls and tokens[n - 1] == words.sep
        assert words.tokenizer.decode(tokens[1 : n - 1].tolist()) == line
    assert (rows["labels"] == NO_LABEL).all() and len(rows["cond"]) == 0


def test_long_lines_are_cut_and_keep_their_closing_token(corpus: str) -> None:
    source = TextLines(path=corpus, tokenizer=said(corpus), length=5)
    assert source.tokens.shape == (4, 5) and source.mask[3].all()
    assert source.tokens[3, -1] == source.words.sep


def test_packing_keeps_every_piece_in_order_and_pads_only_the_last_row(corpus: str) -> None:
    source = TextLines(path=corpus, tokenizer=said(corpus), length=8, pack=True)
    assert source.mask[:-1].all()
    inside = [row[mask][1:-1] for row, mask in zip(source.tokens, source.mask)]
    text = source.words.tokenizer.decode(torch.cat(inside).tolist())
    assert text == " ".join(LINES)


def test_a_column_of_a_table_is_read_after_skipped_lines(tmp_path: Path, corpus: str) -> None:
    table = tmp_path / "table.tab"
    table.write_text("Category\tText\nd\tstring\nclass\t\n\nearn\tthe cat sat\n")
    source = TextLines(path=str(table), tokenizer=said(corpus), length=8, skip=3, column=1)
    assert len(source) == 1 and source.words.tokenizer.decode(source.tokens[0].tolist()) == "the cat sat"
    with pytest.raises(UserError, match="has no column 2"):
        TextLines(path=str(table), tokenizer=said(corpus), length=8, skip=3, column=2)


def test_labels_are_numbered_by_name_and_an_empty_one_means_none(corpus: str, labelled: str) -> None:
    source = TextLabels(path=labelled, tokenizer=said(corpus), length=16)
    assert source.names == ["beast", "bird"] and source.classes == 2
    assert source.fetch(torch.arange(4), None)["labels"].tolist() == [0, 0, 1, NO_LABEL]
    other = TextLabels(path=labelled, tokenizer=said(corpus), length=16, classes=["fish", "bird", "beast"])
    assert other.fetch(torch.arange(4), None)["labels"].tolist() == [2, 2, 1, NO_LABEL]
    with pytest.raises(UserError, match="label 'bird', which `classes` does not name"):
        TextLabels(path=labelled, tokenizer=said(corpus), length=16, classes=["beast"])


def test_numbers_serve_as_labels_of_a_regression(tmp_path: Path, corpus: str, labelled: str) -> None:
    file = tmp_path / "scores.tsv"
    file.write_text("2.5\tthe cat\n\tthe dog\n")
    source = TextLabels(path=str(file), tokenizer=said(corpus), length=8, regression=True)
    assert source.labels.tolist() == [2.5, NO_LABEL] and source.classes == 1 and source.names is None
    with pytest.raises(UserError, match="no number"):
        TextLabels(path=labelled, tokenizer=said(corpus), length=8, regression=True)


def test_copies_lose_the_drawn_share_of_words_and_originals_none(corpus: str, labelled: str) -> None:
    source = TextLabels(path=labelled, tokenizer=said(corpus), length=16, copies=500, unk=0.1)
    ids = torch.arange(len(source))
    assert len(source) == 4 * 501
    rows = source.fetch(ids, Draw(0, 0, ids))
    plain = source.fetch(ids, None)
    assert torch.equal(plain["tokens"][4:8], plain["tokens"][:4])
    changed = rows["tokens"] != plain["tokens"]
    assert not changed[:4].any() and (rows["tokens"][changed] == source.words.unk).all()
    words = plain["mask"] & ~torch.isin(plain["tokens"], torch.tensor(source.words.special))
    assert not (changed & ~words).any()
    count = int(words[4:].sum())
    assert abs(changed.sum() / count - 0.1) < 4 * (0.09 / count) ** 0.5  # four standard errors


def test_augmentation_depends_on_the_slot_and_not_on_the_micro_batch(corpus: str, labelled: str) -> None:
    source = TextLabels(path=labelled, tokenizer=said(corpus), length=16, copies=9, unk=0.5)
    ids = torch.arange(4, 12)
    whole = source.fetch(ids, Draw(7, 3, range(8)))["tokens"]
    parts = [source.fetch(ids[a : a + 2], Draw(7, 3, range(a, a + 2)))["tokens"] for a in range(0, 8, 2)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, source.fetch(ids, Draw(7, 4, range(8)))["tokens"])


def test_copies_may_go_without_a_label(corpus: str, labelled: str) -> None:
    source = TextLabels(path=labelled, tokenizer=said(corpus), length=16, copies=1, label_copies=False)
    assert source.fetch(torch.arange(8), None)["labels"].tolist() == [0, 0, 1, NO_LABEL] + [NO_LABEL] * 4


def test_a_tokenizer_is_trained_once_and_its_cache_follows_the_content(corpus: str, cache: Path) -> None:
    first = tokenizer_of(TrainedTokenizer(**said(corpus)))
    (file,) = cache.iterdir()
    stamp = file.stat().st_mtime_ns
    assert tokenizer_of(TrainedTokenizer(**said(corpus))).key() == first.key() and file.stat().st_mtime_ns == stamp
    assert tokenizer_of(TrainedTokenizer(**said(corpus, 60))).key() != first.key()
    Path(corpus).write_text("other words entirely\n")
    assert tokenizer_of(TrainedTokenizer(**said(corpus))).key() != first.key()
    assert len(list(cache.iterdir())) == 3


def test_training_twice_without_the_cache_gives_the_same_tokenizer(corpus: str, cache: Path) -> None:
    first = tokenizer_of(TrainedTokenizer(**said(corpus))).key()
    for file in cache.iterdir():
        file.unlink()
    assert tokenizer_of(TrainedTokenizer(**said(corpus))).key() == first


def test_a_saved_tokenizer_reads_back_here_and_in_transformers(corpus: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    words = tokenizer_of(TrainedTokenizer(**said(corpus)))
    words.save(tmp_path / "model", 16)
    again = tokenizer_of(str(tmp_path / "model"))
    assert again.special == words.special and again.size == words.size
    tokens, mask = again.rows(LINES, 12)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")(
        LINES, padding="max_length", truncation=True, max_length=12
    )
    assert tokens.tolist() == theirs["input_ids"] and mask.long().tolist() == theirs["attention_mask"]


def test_the_content_key_follows_text_labels_and_vocabulary(corpus: str, labelled: str, tmp_path: Path) -> None:
    key = TextLabels(path=labelled, tokenizer=said(corpus), length=16).content_key()
    assert TextLabels(path=labelled, tokenizer=said(corpus), length=16).content_key() == key
    assert TextLabels(path=labelled, tokenizer=said(corpus, 60), length=16).content_key() != key
    Path(labelled).write_text(Path(labelled).read_text().replace("bird\t", "beast\t"))
    assert TextLabels(path=labelled, tokenizer=said(corpus), length=16).content_key() != key


def test_the_shipped_text_serves_a_general_and_a_ten_class_source() -> None:
    tokenizer = {"corpus": "wordnet/general.txt", "vocab_size": 300}
    general = make_source({"source": "text_lines", "path": "wordnet/general.txt", "tokenizer": tokenizer, "length": 8})
    names = {}
    for split, count in (("train", 2000), ("dev", 1000)):
        task = make_source(
            {"source": "text_labels", "path": f"wordnet/task-{split}.tsv", "tokenizer": tokenizer, "length": 8}
        )
        assert len(task) == count and torch.equal(task.labels.bincount(), torch.full((10,), count // 10))
        names[split] = task.names
    assert len(general) == 10_000 and names["train"] == names["dev"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "no/such.txt"}, "no text file 'no/such.txt': give a path"),
        ({"tokenizer": "no/folder"}, "no tokenizer 'no/folder'"),
        ({"length": 2}, "length=2"),
        ({"lenght": 8}, "did you mean 'length'"),
        ({"skip": 99}, "holds no text after 99 skipped lines"),
    ],
)
def test_bad_entries_say_what_to_mend(corpus: str, config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_source({"source": "text_lines", "path": corpus, "tokenizer": said(corpus), **config})


def test_a_tokenizer_without_special_tokens_and_a_broken_one_are_refused(tmp_path: Path, corpus: str) -> None:
    from tokenizers import Tokenizer, models

    bare, broken = tmp_path / "bare.json", tmp_path / "broken.json"
    Tokenizer(models.WordLevel({"cat": 0}, unk_token="cat")).save(str(bare))
    broken.write_text("{}")
    with pytest.raises(UserError, match="has no pad token"):
        TextLines(path=corpus, tokenizer=str(bare))
    with pytest.raises(UserError, match="is no tokenizer"):
        TextLines(path=corpus, tokenizer=str(broken))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, corpus: str) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        TextLines(path=str(file), tokenizer=said(corpus))
