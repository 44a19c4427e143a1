"""Inputs that a network gains: nothing changes at first, they belong to the call, and constants fold away."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.maths.derivative import derivative
from fewstep.models.denoiser import Denoiser
from fewstep.models.dit import DIT
from fewstep.models.family import DiffusionFamily
from fewstep.models.oracle import MLP
from fewstep.models.unet2d import UNET2D
from fewstep.nets.extra_inputs import ExtraInputs, feeding, folded
from fewstep.nets.lora import checkpointed
from fewstep.roles import Role, RoleSpec, assemble

UNET = {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4}
DIT_SIZES = {"sample_size": 8, "classes": 10, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
NETWORKS = [(UNET2D, UNET), (DIT, DIT_SIZES), (MLP, {"classes": 10})]
ROWS = 5
BOTH = ("delta", "guidance")


def network(family: DiffusionFamily, sizes: dict, trained: bool = False, inputs: tuple[str, ...] = BOTH) -> nn.Module:
    """An upgraded network; `trained`: away from its start, so that the inputs have an effect."""
    torch.manual_seed(0)
    module = family.upgrade(family.build(**sizes).module.eval(), inputs)
    if trained:
        for p in module.extra_inputs.parameters():
            nn.init.normal_(p, std=0.1)
    return module


def cond(delta: float = 0.3, guidance: float = 2.0) -> Cond:
    full = torch.full((ROWS,), 1.0)
    return Cond(label=torch.arange(ROWS), delta=delta * full, guidance=guidance * full)


def run(family: DiffusionFamily, module: nn.Module, said: Cond) -> Tensor:
    x = torch.randn(ROWS, *family.row_shape(module), generator=torch.Generator().manual_seed(0))
    with feeding(module, said):
        return family.unpack(module, module(**family.pack(module, x, torch.full((ROWS,), 700.0), said)), x)


@pytest.mark.parametrize("family, sizes", NETWORKS)
def test_an_upgraded_network_equals_the_given_one_for_every_value(family, sizes):
    """The last layers start at zero: bit for bit, whatever delta and guidance are."""
    torch.manual_seed(0)
    plain = family.build(**sizes).module.eval()
    module = network(family, sizes)
    for delta, guidance in ((0.0, 1.0), (0.37, 4.0), (1.0, 15.0)):
        assert torch.equal(run(family, module, cond(delta, guidance)), run(family, plain, cond()))
    assert set(plain.state_dict()) < set(module.state_dict())
    assert type(module) is type(plain)


@pytest.mark.parametrize("family, sizes", NETWORKS)
def test_every_input_has_an_effect_once_trained(family, sizes):
    module = network(family, sizes, trained=True)
    at = run(family, module, cond(0.3, 2.0))
    assert (run(family, module, cond(0.6, 2.0)) - at).abs().max() > 1e-4
    assert (run(family, module, cond(0.3, 6.0)) - at).abs().max() > 1e-4


@pytest.mark.parametrize("family, sizes", NETWORKS)
def test_constant_inputs_fold_into_a_network_without_them(family, sizes):
    """The folded copy has the given class, its parameter names, and the answers to 1e-6 of their size."""
    module = network(family, sizes, trained=True)
    stock = folded(module, {"delta": 1.0, "guidance": 4.0})
    expected = run(family, module, cond(1.0, 4.0))
    torch.testing.assert_close(
        run(family, stock, cond()), expected, rtol=0, atol=1e-6 * (1 + expected.detach().abs().max().item())
    )
    assert type(stock) is type(module)
    assert set(stock.state_dict()) == set(family.build(**sizes).module.state_dict())
    assert hasattr(module, "extra_inputs"), "folding must not touch the network it copies"


@pytest.mark.parametrize("family, sizes", NETWORKS)
def test_a_deep_copy_reads_its_own_inputs(family, sizes):
    """Training the copy's input layers changes the copy alone."""
    module = network(family, sizes, trained=True)
    before, copied = run(family, module, cond()), copy.deepcopy(module)
    assert torch.equal(run(family, copied, cond()), before)
    nn.init.normal_(copied.extra_inputs.embeddings["delta"][2].bias)
    assert torch.equal(run(family, module, cond()), before)
    assert (run(family, copied, cond()) - before).abs().max() > 1e-3


def test_gradients_are_equal_with_and_without_checkpointing():
    """A block recomputed in the backward pass sees the values of its forward, also when others are then in use."""

    def gradients(checkpoint: bool) -> list[Tensor]:
        module = network(DIT, DIT_SIZES, trained=True)
        if checkpoint:
            checkpointed(module)
        loss = run(DIT, module, cond(0.3)).square().sum()
        with feeding(module, cond(0.9)):
            loss.backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) and sum(g.norm() for g in plain) > 0
    for expected, found in zip(plain, again):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_values_may_differ_from_row_to_row():
    module = network(UNET2D, UNET, trained=True)
    mixed = cond().with_(delta=torch.linspace(0, 1, ROWS))
    for row, delta in enumerate(torch.linspace(0, 1, ROWS).tolist()):
        torch.testing.assert_close(run(UNET2D, module, mixed)[row], run(UNET2D, module, cond(delta))[row])


def test_a_role_that_adds_inputs_reads_them_from_its_condition():
    """Role.adds: the student is a copy with its own inputs; the teacher does not know them; both are averaged or frozen."""
    roles = (Role("teacher"), Role("student", "full", "teacher", defaults={"ema": 0.5}, adds=("delta",)))
    handles = assemble(roles, {"teacher": RoleSpec(**{"from": "unet2d", "build": UNET})}, seed=0)
    teacher, student = Denoiser.of(handles["teacher"]), Denoiser.of(handles["student"])
    x, t, label = torch.randn(ROWS, 1, 8, 8), torch.full((ROWS,), 1.0), torch.arange(ROWS)
    said = Cond(label=label, delta=torch.rand(ROWS))
    assert torch.equal(student.velocity(x, t, said), teacher.velocity(x, t, Cond(label=label)))
    assert any(name.startswith("extra_inputs.") for name in student.ema)
    nn.init.normal_(student.module.extra_inputs.embeddings["delta"][2].weight)
    live = student.velocity(x, t, said)
    with student.averaged():
        assert (student.velocity(x, t, said) - live).abs().max() > 1e-3


def test_a_missing_value_is_named():
    module = network(UNET2D, UNET)
    with pytest.raises(UserError, match="reads 'delta', which its condition lacks: it has \\['label'\\]"):
        run(UNET2D, module, Cond(label=torch.arange(ROWS)))
    with pytest.raises(UserError, match="reads 'delta': call it through a Denoiser"):
        module(torch.zeros(1, 1, 8, 8), 1.0, class_labels=torch.zeros(1, dtype=torch.long))


def test_features_are_smooth_enough_for_the_default_difference():
    """No frequency turns by more than .2 rad over the step h = .005 of a central difference."""
    assert ExtraInputs(("delta",), 4).frequencies.max() * 0.005 < 0.2


# a second time and a sign


TIMES = ("s", "sign")


def two_times(
    family: DiffusionFamily, sizes: dict, trained: bool = False, inputs: tuple[str, ...] = TIMES
) -> nn.Module:
    return network(family, sizes, trained, inputs)


def at(s: float | Tensor, sign: float | None = None, t: float = 0.7) -> tuple[Cond, Tensor]:
    """A condition that says s (and sign), and the time of the call."""
    said = {"label": torch.arange(ROWS), "s": torch.as_tensor(s).expand(ROWS)}
    return Cond(**said, **({} if sign is None else {"sign": torch.full((ROWS,), sign)})), torch.full((ROWS,), t)


def called(family: DiffusionFamily, module: nn.Module, said: Cond, t: Tensor) -> Tensor:
    x = torch.randn(ROWS, *family.row_shape(module), generator=torch.Generator().manual_seed(0))
    with feeding(module, said, t):
        return family.unpack(module, module(**family.pack(module, x, 1000 * t, said)), x)


@pytest.mark.parametrize("family, sizes", NETWORKS)
def test_new_times_change_nothing_at_first(family, sizes):
    """The last layers start at zero: bit for bit, whatever s and sign are."""
    torch.manual_seed(0)
    plain, module = family.build(**sizes).module.eval(), two_times(family, sizes)
    for s, sign in ((0.7, 1.0), (0.3, 1.0), (0.0, -1.0)):
        assert torch.equal(called(family, module, *at(s, sign)), called(family, plain, *at(s)))


@pytest.mark.parametrize("family, sizes", NETWORKS)
@pytest.mark.parametrize("t", [0.0, 0.31, 0.7, 1.0])
def test_a_trained_network_is_an_ordinary_one_at_s_equal_t_and_sign_plus_one(family, sizes, t):
    """phi(t - s) - phi(0) and the switched phi(t) are zeros there, and no bias comes behind them: bit for bit for good."""
    module = two_times(family, sizes, trained=True)
    plain = family.build(**sizes).module.eval()
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("extra_inputs.")})
    expected = called(family, plain, *at(t, t=t))
    assert torch.equal(called(family, module, *at(t, 1.0, t)), expected)
    assert torch.equal(called(family, module, *at(t, None, t)), expected), "sign is +1 where nothing is said"


@pytest.mark.parametrize("family, sizes", NETWORKS)
def test_a_trained_network_reads_the_gap_and_the_sign(family, sizes):
    module = two_times(family, sizes, trained=True)
    base, gap, twin = (called(family, module, *at(s, sign)) for s, sign in ((0.7, 1.0), (0.2, 1.0), (0.7, -1.0)))
    assert (gap - base).abs().max() > 1e-4 and (twin - base).abs().max() > 1e-4
    assert (called(family, module, *at(0.2, -1.0)) - gap).abs().max() > 1e-4


def test_rows_with_and_without_a_gap_do_not_touch_each_other():
    module = two_times(UNET2D, UNET, trained=True)
    mixed = torch.tensor([0.7, 0.2, 0.7, 0.0, 0.5])
    found = called(UNET2D, module, *at(mixed))
    for row, s in enumerate(mixed.tolist()):
        torch.testing.assert_close(found[row], called(UNET2D, module, *at(s))[row])


def test_their_layers_have_no_biases_and_are_saved_with_the_network():
    module = two_times(UNET2D, UNET, trained=True, inputs=("s", "sign", "guidance"))
    names = {name for name in module.state_dict() if name.startswith("extra_inputs.")}
    biased = {name.split(".")[2] for name in names if name.endswith("bias")}
    assert biased == {"guidance"}
    assert names == {
        f"extra_inputs.embeddings.{i}.{layer}.{part}"
        for i in ("s", "sign", "guidance")
        for layer in (0, 2)
        for part in (("weight", "bias") if i == "guidance" else ("weight",))
    }
    other = two_times(UNET2D, UNET, inputs=("s", "sign", "guidance"))
    other.load_state_dict(module.state_dict(), strict=True)
    said, t = at(0.2, -1.0)
    said = said.with_(guidance=torch.full((ROWS,), 3.0))
    assert torch.equal(called(UNET2D, other, said, t), called(UNET2D, module, said, t))


def test_gradients_of_a_gap_are_equal_with_and_without_checkpointing():
    """A block that is recomputed while another s is in use sees the s and t of its forward."""

    def gradients(checkpoint: bool) -> list[Tensor]:
        module = two_times(DIT, DIT_SIZES, trained=True)
        if checkpoint:
            checkpointed(module)
        loss = called(DIT, module, *at(0.2, -1.0)).square().sum()
        with feeding(module, *at(0.6, 1.0, t=0.9)):
            loss.backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) and sum(g.norm() for g in plain) > 0
    for expected, found in zip(plain, again):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family, sizes", NETWORKS)
@pytest.mark.parametrize("moved", ["t", "s"])
def test_forward_mode_runs_through_the_gap(family, sizes, moved):
    """d/dt and d/ds of the answer against central differences in float64."""
    module = two_times(family, sizes, trained=True).double()
    x = torch.randn(ROWS, *family.row_shape(module), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = {"t": torch.full((ROWS,), 0.7).double(), "s": torch.full((ROWS,), 0.2).double()}

    def f(value: Tensor) -> Tensor:
        t, s = {**start, moved: value}.values()
        said = Cond(label=torch.arange(ROWS), s=s)
        with feeding(module, said, t):  # the label is held, so that the derivative is that of the new input alone
            return family.unpack(module, module(**family.pack(module, x, torch.full((ROWS,), 700.0), said)), x)

    exact, near = (derivative(f, start[moved], how, 1e-4)[1] for how in ("jvp", "central"))
    torch.testing.assert_close(exact, near, rtol=1e-3, atol=1e-5)
    assert exact.abs().max() > 1e-3


def test_a_gap_and_a_sign_cannot_be_made_constants():
    module = two_times(UNET2D, UNET, trained=True)
    with pytest.raises(UserError, match="'s' changes with the time of a call"):
        folded(module, {"s": 0.0, "sign": 1.0})


def test_a_missing_second_time_is_named():
    said, t = at(0.2)
    with pytest.raises(UserError, match="reads 's', which its condition lacks: it has \\['label'\\]"):
        called(UNET2D, two_times(UNET2D, UNET), Cond(label=said["label"]), t)
