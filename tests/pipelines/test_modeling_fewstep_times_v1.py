"""The second time as a component of a pipeline: it adds what the trained inputs add, bit for bit."""

from __future__ import annotations

import ast
import inspect
import json
import sys

import pytest
import torch
from fewstep_pipelines import FewStepTimes, modeling_fewstep_times_v1
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.models.dit import DIT
from fewstep.models.family import DiffusionFamily
from fewstep.models.times import read_times, times_of, write_times
from fewstep.models.unet2d import UNET2D
from fewstep.nets.extra_inputs import feeding, reads, without

UNET = {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4}
DIT_SIZES = {"sample_size": 8, "classes": 10, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
NETWORKS = [(UNET2D, UNET), (DIT, DIT_SIZES)]
ROWS = 5


def network(family: DiffusionFamily, sizes: dict, inputs: tuple[str, ...]) -> nn.Module:
    """A network whose inputs have an effect."""
    torch.manual_seed(0)
    module = family.upgrade(family.build(**sizes).module.eval(), inputs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def times_for(family: DiffusionFamily, module: nn.Module) -> FewStepTimes:
    assert family.facts.time_embedding is not None
    return times_of(module, family.facts.time_embedding)


def called(family: DiffusionFamily, module: nn.Module, t: Tensor) -> Tensor:
    x = torch.randn(ROWS, *family.row_shape(module), generator=torch.Generator().manual_seed(0))
    said = Cond(label=torch.arange(ROWS))
    return family.unpack(module, module(**family.pack(module, x, 1000 * t.expand(ROWS), said)), x)


def test_the_file_imports_torch_diffusers_and_the_standard_library_only():
    tree = ast.parse(inspect.getsource(modeling_fewstep_times_v1))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    assert {name.split(".")[0] for name in names} <= {"torch", "diffusers", *sys.stdlib_module_names}


@pytest.mark.parametrize(("family", "sizes"), NETWORKS)
@pytest.mark.parametrize("inputs", [("s",), ("sign", "s"), ("s", "sign", "guidance")])
def test_it_equals_the_trained_inputs_bit_for_bit(family, sizes, inputs):
    """phi(t - s) - phi(0) and the layers behind; `sign` adds exactly nothing at +1 and is left behind."""
    module = network(family, sizes, inputs)
    values = {"s": torch.linspace(0, 0.6, ROWS), "guidance": torch.linspace(1, 7, ROWS)}
    t, times = torch.linspace(0.6, 1, ROWS), times_for(family, module)
    with feeding(module, Cond(**values), t):
        expected = called(family, module, t)
    stock = without(module)
    with torch.no_grad(), times.feeding(stock, t, **values):
        found = called(family, stock, t)
    assert torch.equal(found, expected)
    assert (found - called(family, stock, t)).abs().max() > 1e-3, "outside of the block it is the plain network"
    assert tuple(times.embeddings) == tuple(name for name in inputs if name != "sign")


@pytest.mark.parametrize(("family", "sizes"), NETWORKS)
def test_one_row_of_times_serves_all_rows_and_s_equal_t_is_nothing(family, sizes):
    module = network(family, sizes, ("s",))
    times, stock = times_for(family, module), without(module)
    t, s = torch.full((1,), 0.7), torch.full((1,), 0.2)
    with torch.no_grad():
        with times.feeding(stock, t, s=s):
            one = called(family, stock, t)
        with times.feeding(stock, t.expand(ROWS), s=s.expand(ROWS)):
            torch.testing.assert_close(called(family, stock, t), one)
        with times.feeding(stock, t, s=t):
            same = called(family, stock, t)
    assert torch.equal(same, called(family, stock, t))


def test_saved_weights_are_read_back_by_diffusers_and_into_a_network(tmp_path):
    module = network(UNET2D, UNET, ("s", "guidance"))
    write_times(times_for(UNET2D, module), tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".safetensors"}, "no code"
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["names"], said["width"], said["time_embedding"]) == (["s", "guidance"], 32, "time_embedding")
    again = FewStepTimes.from_pretrained(tmp_path)
    given = {"s": torch.linspace(0, 0.6, ROWS), "guidance": torch.full((ROWS,), 3.0)}
    t = torch.linspace(0.6, 1, ROWS)
    assert torch.equal(again(t, **given), times_for(UNET2D, module)(t, **given))
    other = read_times(UNET2D.build(**UNET).module, tmp_path)
    assert reads(other) == ("s", "guidance")
    assert torch.equal(times_for(UNET2D, other)(t, **given), again(t, **given))


def test_half_precision_keeps_its_features_in_float32():
    """At 32 radians bf16 would turn an angle by .1; rounding the finished features costs a hundredth."""
    times = times_for(UNET2D, network(UNET2D, UNET, ("s",)))
    t, s = torch.linspace(0.6, 1, ROWS), torch.linspace(0, 0.6, ROWS)
    exact = times(t, s=s)
    half = nn.Module.to(times, torch.bfloat16)(t, s=s)
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.02 * exact.abs().max()


def test_a_compiled_network_is_told_each_steps_times():
    """One graph serves all steps; torch.compile hides the names of submodules."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    module = network(UNET2D, UNET, ("s",))
    times, stock = times_for(UNET2D, module), without(module)
    compiled = torch.compile(stock, backend=backend)
    x, label = torch.randn(2, *UNET2D.row_shape(stock)), torch.arange(2)
    for t, s in ((1.0, 0.5), (0.5, 0.25), (0.25, 0.0)):
        with torch.no_grad(), times.feeding(compiled, torch.full((1,), t), s=torch.full((1,), s)):
            found = compiled(x, torch.full((2,), 1000 * t), class_labels=label).sample
        with torch.no_grad(), times.feeding(stock, torch.full((1,), t), s=torch.full((1,), s)):
            torch.testing.assert_close(found, stock(x, torch.full((2,), 1000 * t), class_labels=label).sample)
    assert len(graphs) == 1


def test_what_is_missing_is_named():
    module = network(UNET2D, UNET, ("s", "guidance"))
    times, one = times_for(UNET2D, module), torch.ones(1)
    with pytest.raises(ValueError, match="reads 'guidance'"), times.feeding(module, one, s=one):
        pass
    elsewhere = times.feeding(nn.Linear(1, 1), one, s=one, guidance=one)
    with pytest.raises(ValueError, match="Linear has no 'time_embedding'"), elsewhere:
        pass
    assert not any(part._forward_hooks for part in without(module).modules()), "no hook is left behind"
