"""Network evaluations are counted at the network."""

import pytest
import torch
from torch import nn

from fewstep.evaluation.nfe import count_calls


class _Net(nn.Module):
    def forward(self, x, t=None, cond=None):
        return x


def test_guidance_in_a_doubled_batch_costs_two_evaluations_an_image():
    network, images = _Net(), torch.zeros(3, 1, 4, 4)
    with count_calls(network) as calls:
        for _ in range(4):
            network(torch.cat([images, images]), torch.tensor(0.5))
    assert (calls.calls, calls.rows, calls.per_image(3)) == (4, 24, 8.0)


@pytest.mark.parametrize(
    "call",
    [
        {"x": torch.zeros(5, 2, 4), "t": torch.zeros(5)},
        {"t": torch.zeros(1), "x": torch.zeros(5, 2, 4)},  # a time of one number stands first
        {"x": [torch.zeros(2, 4)] * 5, "t": torch.zeros(5)},  # one tensor an image
    ],
)
def test_rows_are_those_of_the_sample_however_it_is_passed(call):
    network = _Net()
    with count_calls(network) as calls:
        network(**call)
    assert (calls.calls, calls.rows) == (1, 5)


def test_nothing_is_counted_after_the_block():
    network = _Net()
    with pytest.raises(ZeroDivisionError), count_calls(network) as calls:
        network(torch.zeros(1, 1))
        raise ZeroDivisionError
    network(torch.zeros(1, 1))
    assert calls.calls == 1
    assert not network._forward_pre_hooks
