"""ERNIE-Tiny (arXiv 2106.02241): its losses in numbers, and single steps of its stages by hand."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.data.batch import Batch
from fewstep.errors import UserError
from fewstep.methods.language.ernie_tiny import (
    Projectors,
    attention_kl,
    attention_mse,
    hidden_mse,
    layer_map,
    soft_rows,
)
from fewstep.methods.language.text_classify import hard_rows

from . import language

LATENT = ("gd", "ged", "tad")


pytestmark = pytest.mark.usefixtures("cache")


# ---- the losses


TEACHER = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])  # probabilities .731059 .268941, .119203 .880797
UNIFORM, ALL = torch.zeros(1, 1, 2, 2), torch.ones(1, 2, dtype=torch.bool)


def test_attention_mse_and_kl_have_the_known_values() -> None:
    assert attention_mse(UNIFORM, TEACHER, ALL, probs=True).item() / 4 == pytest.approx(0.0991972, abs=1e-7)
    assert attention_kl(UNIFORM, TEACHER, ALL).item() / 2 == pytest.approx(0.2193787, abs=1e-6)
    assert attention_mse(UNIFORM, TEACHER, ALL, probs=False).item() == pytest.approx(TEACHER.square().sum().item())


def test_soft_and_hard_losses_have_the_known_values() -> None:
    theirs, ours = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    p = theirs.softmax(-1)
    entropy = -(p * p.log()).sum().item()
    assert soft_rows(ours, theirs, 1.0).item() + entropy == pytest.approx(0.727127, abs=1e-6)
    assert hard_rows(ours, torch.tensor([0])).item() == pytest.approx(0.407606, abs=1e-6)


def test_soft_loss_has_the_factor_t_squared_and_is_squared_error_with_one_output() -> None:
    theirs, ours = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    torch.testing.assert_close(soft_rows(ours, theirs, 3.0), 9 * soft_rows(ours / 3, theirs / 3, 1.0))
    assert soft_rows(torch.tensor([[1.5]]), torch.tensor([[1.0]]), 3.0).item() == 0.25


def test_rows_without_a_label_count_nothing_in_the_hard_loss() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = hard_rows(logits, torch.tensor([1, -100, -100]))
    assert loss[1:].tolist() == [0, 0] and loss[0] > 0
    loss.sum().backward()
    assert logits.grad is not None and logits.grad[0].any() and not logits.grad[1:].any()


def test_latent_losses_see_valid_positions_only() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ours, theirs = torch.randn(2, 2, 2, 3, 3)
    h, k = torch.randn(2, 2, 3, 5)
    by_hand = sum(
        (ours[b, a, i, j] - theirs[b, a, i, j]) ** 2 / 2
        for b, n in ((0, 2), (1, 1))
        for a in range(2)
        for i in range(n)
        for j in range(n)
    )
    torch.testing.assert_close(attention_mse(ours, theirs, mask, probs=False).sum(), by_hand)
    valid = ((h - k) ** 2).mean(-1)
    torch.testing.assert_close(hidden_mse(h, k, mask), torch.stack([valid[0, :2].sum(), valid[1, 0]]))
    shifted = torch.where(mask[:, None, None, :] & mask[:, None, :, None], ours, ours + 7)
    for loss in (attention_kl, lambda *a: attention_mse(*a, probs=True), lambda *a: attention_mse(*a, probs=False)):
        torch.testing.assert_close(loss(shifted, theirs, mask), loss(ours, theirs, mask))


def test_different_numbers_of_heads_compare_their_averages() -> None:
    torch.manual_seed(0)
    ours, theirs, mask = torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3), torch.ones(1, 3, dtype=torch.bool)
    p, q = theirs.softmax(-1).mean(1), ours.softmax(-1).mean(1)
    torch.testing.assert_close(attention_kl(ours, theirs, mask).sum(), (p * (p / q).log()).sum())
    torch.testing.assert_close(attention_mse(ours, theirs, mask, probs=True).sum(), ((p - q) ** 2).sum())


def test_a_text_of_padding_alone_gives_zero_and_finite_gradients() -> None:
    ours, mask = torch.randn(1, 2, 3, 3, requires_grad=True), torch.zeros(1, 3, dtype=torch.bool)
    loss = attention_kl(ours, torch.randn(1, 2, 3, 3), mask) + attention_mse(ours, ours.detach(), mask, probs=True)
    loss.sum().backward()
    assert loss.item() == 0 and ours.grad is not None and not ours.grad.any()


def test_uniform_layer_map_and_its_errors() -> None:
    assert layer_map(None, 4, 12) == (3, 6, 9, 12) and layer_map(None, 3, 12) == (4, 8, 12)
    assert layer_map((2, 5, 6), 3, 6) == (2, 5, 6)
    with pytest.raises(UserError, match="12 teacher layers are no multiple of 5"):
        layer_map(None, 5, 12)
    for wrong in ((1, 2), (0, 1, 2), (1, 2, 7)):
        with pytest.raises(UserError, match="write 3 layers of the teacher"):
            layer_map(wrong, 3, 6)


def test_projections_start_as_identity_or_orthogonal_and_are_shared_or_not() -> None:
    torch.manual_seed(0)
    states = list(torch.randn(3, 1, 2, 4))
    assert all(torch.equal(a, b) for a, b in zip(Projectors(4, 4, 1)(states), states))
    wide = Projectors(4, 6, 3)
    for layer in wide.layers:
        torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(4))
    assert len({id(layer) for layer in wide.layers}) == 3 and len(wide(states)) == 3
    assert not torch.equal(wide(states[:1] * 2)[0], wide(states[:1] * 2)[1])


# ---- stages by hand


@pytest.mark.parametrize("config", [{}, {"attention": "probs"}, {"attention_loss": "kl"}])
def test_a_copy_of_the_teacher_has_no_latent_loss_until_the_teacher_changes(
    world: Path, tmp_path: Path, config: dict
) -> None:
    said = language.recipe(world, student={"from": str(world / "pretrained")}, config=config)
    method = language.bound(said, tmp_path / "run")
    batch = language.rows(method, "general")
    gd, ged = (language.terms(language.step(method, name, batch)) for name in ("gd", "ged"))
    assert gd["hidden"] == 0 and gd["attention"].abs() < 1e-7
    assert ged["hidden"] > 0.01 and ged["attention"] > 0.001
    method.finetuned = method.pretrained
    same = language.terms(language.step(method, "ged", batch))
    assert same["hidden"] == 0 and same["attention"].abs() < 1e-7


def test_latent_stages_never_touch_the_classifier_and_ignore_labels(world: Path, tmp_path: Path) -> None:
    method = language.bound(language.recipe(world), tmp_path / "run")
    batch = language.rows(method, "task", 81)
    for name in LATENT:
        update = language.step(method, name, batch)
        assert update.roles == ("student", "projectors") and set(update.losses) == {"attention", "hidden"}
        sum(language.terms(update).values()).backward()
    assert all(p.grad is None for p in method.head.module.parameters())
    assert all(p.grad is None for p in method.student.module.pooler.parameters())
    assert all(p.grad is not None for p in method.projectors.module.parameters())
    shuffled = Batch(batch.ids, {**batch.fields, "labels": batch.labels.roll(27)})
    assert not torch.equal(shuffled.labels, batch.labels)
    for name, equal in (("tad", True), ("tsd", False)):
        torch.manual_seed(0)
        a = language.terms(language.step(method, name, batch))
        b = language.terms(language.step(method, name, shuffled))
        assert all(torch.equal(a[term], b[term]) for term in a) is equal


@pytest.mark.parametrize("config", [{}, {"attention": "probs"}, {"attention_loss": "kl", "shared_projector": False}])
def test_more_padding_changes_no_loss(world: Path, tmp_path: Path, config: dict) -> None:
    method = language.bound(language.recipe(world, config=config), tmp_path / "run")
    for role in (method.pretrained, method.finetuned, method.student, method.projectors, method.head):
        role.module.double()
    batch = language.rows(method, "task", 12)
    wide = {n: nn.functional.pad(batch.fields[n], (0, 4)) for n in ("tokens", "mask")}
    assert batch.mask.shape[1] == 12 and not wide["mask"][:, 12:].any()
    padded = Batch(batch.ids, {**batch.fields, **wide})
    for name in (*LATENT, "tsd"):
        a, b = (language.terms(language.step(method, name, rows)) for rows in (batch, padded))
        assert set(a) == set(b)
        for term in a:
            torch.testing.assert_close(a[term], b[term], rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 6])
def test_losses_are_finite_without_labels_and_without_text(world: Path, tmp_path: Path, count: int) -> None:
    method = language.bound(language.recipe(world), tmp_path / "run")
    batch = language.rows(method, "task", count)
    unlabelled = Batch(batch.ids, {**batch.fields, "labels": torch.full((count,), -100)})
    terms = language.terms(language.step(method, "tsd", unlabelled))
    assert terms["hard"] == 0 and terms["soft"] > 0 and all(t.isfinite() for t in terms.values())
    empty = Batch(batch.ids, {**batch.fields, "mask": torch.zeros_like(batch.mask)})
    terms = language.terms(language.step(method, "gd", empty))
    assert terms["attention"] == 0 and terms["hidden"] == 0


def test_one_step_is_a_function_of_its_batch(world: Path, tmp_path: Path) -> None:
    method = language.bound(language.recipe(world), tmp_path / "run")
    batch = language.rows(method, "task")
    before = {n: p.clone() for n, p in method.student.module.state_dict().items()}
    first, second = (language.terms(language.step(method, "tsd", batch)) for _ in range(2))
    assert all(torch.equal(first[term], second[term]) for term in first)
    assert all(torch.equal(before[n], p) for n, p in method.student.module.state_dict().items())
