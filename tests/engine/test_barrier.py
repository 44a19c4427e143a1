"""`yield` as a barrier: parts advance together, gradients add up, only the named roles receive them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.engine.barrier import ContractError, Gradients, advance
from fewstep.methods.base import Mean, Total, Update

student, teacher = nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False)
X = torch.arange(12.0).reshape(4, 3)


def gradients(weights=None, parts=2):
    roles = {"student": list(student.parameters()), "teacher": list(teacher.parameters())}
    return Gradients(lambda names: [p for n in names for p in roles[n]], lambda t: (weights or {}).get(t, 1.0), parts)


def run(parts, weights=None):
    for p in (*student.parameters(), *teacher.parameters()):
        p.grad = None
    barriers = []
    advance(parts, [(i,) for i in range(len(parts))], gradients(weights, len(parts)), barriers.append)
    return barriers


def rows(x):
    yield Update("student", {"square": student(x).square().squeeze(1)})


def test_two_parts_give_the_gradient_of_the_whole_batch():
    run([rows(X)])
    whole = student.weight.grad.clone()
    barriers = run([rows(X[:2]), rows(X[2:])])
    torch.testing.assert_close(student.weight.grad, whole)
    torch.testing.assert_close(barriers[0].metrics["loss.square"], student(X).square().mean().detach())


def test_a_global_normaliser_is_not_averaged_twice():
    def part(x, count):
        n = yield Total(tokens=torch.tensor(float(count)))
        assert n["tokens"] == 4
        yield Update("student", {"sum": Mean(student(x).squeeze(1), n["tokens"])})

    run([part(X[:1], 1), part(X[1:], 3)])
    torch.testing.assert_close(student.weight.grad, X.mean(0, keepdim=True))


def test_a_total_of_zero_gives_zero_and_not_nan():
    def part(x):
        n = yield Total(tokens=torch.zeros(()))
        yield Update("student", {"sum": Mean((student(x) * 0).squeeze(1), n["tokens"])})

    assert run([part(X)])[0].metrics["loss.sum"] == 0
    assert (student.weight.grad == 0).all()


def test_gradient_flows_through_another_role_but_not_into_it():
    def part(x):
        yield Update("student", {"through": teacher(student(x)).square().squeeze(1)})

    run([part(X)])
    assert student.weight.grad.abs().sum() > 0 and teacher.weight.grad is None


def test_weights_multiply_terms_and_zero_switches_one_off():
    def part(x):
        bad = (student(x) * float("nan")).squeeze(1)
        yield Update("student", {"good": student(x).squeeze(1), "bad": bad})

    run([part(X)], {"good": 3.0, "bad": 0.0})
    torch.testing.assert_close(student.weight.grad, 3 * X.mean(0, keepdim=True))


def test_all_parts_reach_a_barrier_before_any_goes_on():
    seen = []

    def part(name, x):
        seen.append(f"{name} first")
        yield Update("student", {"a": student(x).squeeze(1)})
        seen.append(f"{name} second")

    run([part("one", X[:2]), part("two", X[2:])])
    assert seen == ["one first", "two first", "one second", "two second"]


def test_global_generators_depend_on_part_and_segment_alone():
    drawn: dict[str, list[float]] = {"a": [], "b": []}

    def part(name, x):
        drawn[name].append(torch.rand(()).item())
        yield Update("student", {"a": student(x).squeeze(1)})
        drawn[name].append(torch.rand(()).item())

    run([part("a", X)])
    alone = list(drawn["a"])
    torch.rand(100)
    drawn["a"].clear()
    run([part("a", X[:2]), part("b", X[2:])])
    assert drawn["a"] == alone and len({*drawn["a"], *drawn["b"]}) == 4


@pytest.mark.parametrize("loss", [torch.tensor(1.0, requires_grad=True), torch.ones(2, 2, requires_grad=True)])
def test_losses_are_rows(loss):
    def part():
        yield Update("student", {"scalar": loss * student(X).sum()})

    with pytest.raises(ContractError, match="give \\[rows\\]"):
        run([part()])


def test_parts_that_disagree_are_a_bug_in_the_method():
    def other(x):
        yield Total(n=torch.ones(()))
        yield Update("student", {"a": student(x).squeeze(1)})

    with pytest.raises(ContractError, match="yields must not depend on data"):
        run([rows(X[:2]), other(X[2:])])
