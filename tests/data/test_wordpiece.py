"""Learning word pieces: the merges of byte-pair encoding, with ties broken by name."""

import random
from collections import Counter
from itertools import pairwise

from fewstep.data.wordpiece import learn_pieces


def recount(words: dict[str, int], merges: int) -> list[str]:
    """Byte-pair encoding by counting every pair anew before each merge."""
    split = {word: [word[0], *("##" + letter for letter in word[1:])] for word in words}
    made = []
    for _ in range(merges):
        counts: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                counts[pair] += words[word]
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        made.append(a + b[2:])
        for pieces in split.values():
            i = 0
            while i + 1 < len(pieces):
                if (pieces[i], pieces[i + 1]) == (a, b):
                    pieces[i : i + 2] = [a + b[2:]]
                i += 1
    return made


def test_the_textbook_words_merge_in_the_textbook_order() -> None:
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}  # Sennrich et al. 2016, without their end-of-word mark
    pieces = learn_pieces(words, 16)
    letters = {"l", "n", "w", "##d", "##e", "##i", "##o", "##r", "##s", "##t", "##w"}
    assert set(pieces[:11]) == letters
    assert pieces[11:] == [
        "##es",
        "##est",
        "##ow",
        "low",
        "##ew",
    ]  # 9, 9, 7, 7, 6, the first by name where two are equal


def test_merges_equal_those_of_counting_anew() -> None:
    source = random.Random(0)
    words = {"".join(source.choices("abc", k=source.randint(1, 9))): source.randint(1, 5) for _ in range(60)}
    expected = list(dict.fromkeys(recount(words, 40)))
    letters = {word[0] for word in words} | {"##" + letter for word in words for letter in word[1:]}
    assert learn_pieces(words, len(letters) + len(expected))[len(letters) :] == expected


def test_the_order_of_the_words_does_not_matter() -> None:
    words = {"abab": 2, "baba": 2, "aabb": 2, "bbaa": 2}
    assert learn_pieces(words, 12) == learn_pieces(dict(reversed(words.items())), 12)


def test_the_rarest_letters_go_when_there_are_more_than_fit() -> None:
    assert learn_pieces({"a": 3, "b": 2, "c": 1}, 2) == ["a", "b"]


def test_learning_ends_when_every_word_is_whole() -> None:
    assert learn_pieces({"ab": 1, "c": 1}, 100) == ["##b", "a", "c", "ab"]
