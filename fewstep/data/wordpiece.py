"""Learning a vocabulary of word pieces, the same one in every process.

Pieces are made as in byte-pair encoding (Sennrich, Haddow, Birch, arXiv 1508.07909): the most frequent pair of neighbours
becomes one piece, until there are enough; a piece that continues a word begins with "##". The trainers of the tokenizers
library break ties by the order of a hash table, so that two runs number words differently.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

CONTINUES = "##"
Pair = tuple[str, str]


def learn_pieces(words: Mapping[str, int], size: int) -> list[str]:
    """At most `size` pieces for words with their counts: characters first, then pieces in the order of merging.

    Of equally frequent pairs the alphabetically first is merged. Where there are more characters than `size`, the rarest
    are left out.
    """
    order = sorted(words)
    weights = [words[word] for word in order]
    split = [[word[0], *(CONTINUES + letter for letter in word[1:])] for word in order]
    pieces = dict.fromkeys(_characters(split, weights)[:size])
    pairs, places = _neighbours(split, weights)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(pieces) < size:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair]:  # out of date: words that held it were merged in the meantime
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        pieces[_joined(pair)] = None
        for changed in _merge(pair, split, weights, pairs, places):
            heapq.heappush(heap, (-pairs[changed], changed))
    return list(pieces)


def _characters(split: Sequence[Sequence[str]], weights: Sequence[int]) -> list[str]:
    counts: Counter[str] = Counter()
    for word, weight in zip(split, weights):
        for piece in word:
            counts[piece] += weight
    return sorted(counts, key=lambda piece: (-counts[piece], piece))


def _neighbours(
    split: Sequence[Sequence[str]], weights: Sequence[int]
) -> tuple[Counter[Pair], defaultdict[Pair, set[int]]]:
    """How often two pieces stand side by side, and in which words."""
    pairs: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, (word, weight) in enumerate(zip(split, weights)):
        for pair in pairwise(word):
            pairs[pair] += weight
            places[pair].add(index)
    return pairs, places


def _merge(
    pair: Pair,
    split: list[list[str]],
    weights: Sequence[int],
    pairs: Counter[Pair],
    places: defaultdict[Pair, set[int]],
) -> set[Pair]:
    """Joins `pair` wherever it stands, keeps the counts right, and returns the pairs that may have become more frequent."""
    grown: set[Pair] = set()
    for index in places.pop(pair):
        for old in pairwise(split[index]):
            pairs[old] -= weights[index]
        split[index] = _with_joined(split[index], pair)
        for new in pairwise(split[index]):
            pairs[new] += weights[index]
            places[new].add(index)
            grown.add(new)
    return grown


def _with_joined(word: Sequence[str], pair: Pair) -> list[str]:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] = _joined(pair)
        else:
            joined.append(piece)
    return joined


def _joined(pair: Pair) -> str:
    return pair[0] + pair[1].removeprefix(CONTINUES)
