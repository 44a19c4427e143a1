"""Which samples come: every one once an epoch, in an order that depends on seed and epoch alone, in groups if asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewstep.data.registry import make_source
from fewstep.engine.feed import Feed, Feeds
from fewstep.errors import UserError
from fewstep.methods.base import Selection

SOURCE = make_source({"source": "labels", "classes": 10, "count": 24})


def epoch(feed: Feed) -> np.ndarray:
    found = []
    while not feed.ended:
        found.append(feed.next())
    return np.concatenate(found)


def test_every_sample_comes_once_an_epoch_in_another_order():
    feed = Feed(SOURCE, "train", seed=0, batch=8)
    first = epoch(feed)
    feed.start_epoch()
    second = epoch(feed)
    assert sorted(first) == sorted(second) == list(range(24))
    assert list(first) != list(second)
    assert list(first) == list(epoch(Feed(SOURCE, "train", seed=0, batch=8)))
    assert list(first) != list(epoch(Feed(SOURCE, "train", seed=1, batch=8)))


def test_the_state_goes_on_where_it_stopped():
    feed = Feed(SOURCE, "train", seed=0, batch=8)
    feed.select(Selection(torch.arange(0, 24, 2), torch.linspace(0, 1, 12)))
    feed.next()
    other = Feed(SOURCE, "train", seed=0, batch=8)
    other.load_state(feed.state())
    assert other.ended == feed.ended and other.epoch == feed.epoch
    assert torch.equal(other.selection.ids, feed.selection.ids)
    feed.start_epoch(), other.start_epoch()
    assert list(feed.next()) == list(other.next())


def test_groups_stay_together():
    feed = Feed(SOURCE, "train", seed=0, batch=8)
    feed.select(Selection(torch.arange(24), group=4))
    order = epoch(feed).reshape(-1, 4)
    assert all((group == group[0] + np.arange(4)).all() and group[0] % 4 == 0 for group in order)
    assert list(order[:, 0]) != sorted(order[:, 0])


def test_a_small_selection_wraps_around():
    feed = Feed(SOURCE, "train", seed=0, batch=8)
    feed.select(Selection(torch.tensor([3, 5, 7])))
    ids = feed.rows(feed.next(), None).ids
    assert len(ids) == 8 and set(ids.tolist()) == {3, 5, 7}


def test_an_offline_pass_sees_everything_once_in_order():
    feed = Feed(SOURCE, "train", seed=0, batch=10, shuffle=False)
    assert feed.per_epoch == 3
    assert list(epoch(feed)) == list(range(24))


def test_an_empty_selection_is_an_error():
    feed = Feed(SOURCE, "train", seed=0, batch=8)
    with pytest.raises(UserError, match=r"data\.train serves no sample"):
        feed.select(Selection(torch.empty(0, dtype=torch.int64)))


def test_several_sources_come_under_their_names():
    feeds = Feeds({n: Feed(SOURCE, n, seed=0, batch=8) for n in ("prompts", "real")})
    from fewstep.draws import Draw

    batch = feeds.batch({n: f.next() for n, f in feeds.items()}, Draw(0, 0, np.arange(8)))
    assert len(batch) == 8 and batch.prompts.cond["label"].shape == batch.real.cond["label"].shape == (8,)
    assert batch.prompts.ids.tolist() != batch.real.ids.tolist()
