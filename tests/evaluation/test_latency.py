"""The median after a warm-up."""

import pytest

from fewstep.evaluation.latency import LatencySpec, measure


def test_warm_up_is_thrown_away_and_one_slow_call_does_not_move_the_median():
    times = iter([900.0, 500.0, 10.0, 11.0, 12.0, 13.0, 400.0])
    asked = []
    found = measure(lambda batch: asked.append(batch) or next(times), LatencySpec(warmup=2, runs=5, batch=3))
    assert (found.median_ms, found.low_ms, found.high_ms) == (12.0, 11.0, 13.0)
    assert asked == [3] * 7
    assert (found.batch, found.runs) == (3, 5)
    assert found.device


def test_one_call_has_no_spread_and_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        LatencySpec(runs=1)
