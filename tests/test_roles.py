"""Where roles' weights come from, and that a shared base really is one copy."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import UserError
from fewstep.roles import Role, RoleSpec, assemble, merge_spec, merged

TEACHER = RoleSpec.model_validate(
    {"from": "unet2d", "build": {"sample_size": 8, "classes": 10, "block_out_channels": [8, 16], "norm_num_groups": 4}}
)
ROLES = (Role("student", tune="lora", init="teacher"), Role("teacher"), Role("fake_score", tune="lora", init="teacher"))


def specs(**said):
    return {"teacher": TEACHER, **{name: RoleSpec.model_validate(spec) for name, spec in said.items()}}


def test_lora_roles_are_views_on_one_copy_of_the_weights():
    handles = assemble(ROLES, specs(), seed=0)
    assert handles["student"].module is handles["teacher"].module is handles["fake_score"].module
    assert handles["student"].adapter is not handles["fake_score"].adapter
    assert handles["teacher"].trainable() == {}
    assert not any(p.requires_grad for p in handles["teacher"].module.parameters())


def test_full_tuning_copies_the_weights():
    handles = assemble(ROLES, specs(student={"tune": "full"}), seed=0)
    student, teacher = handles["student"], handles["teacher"]
    assert student.module is not teacher.module
    assert len(student.trainable()) == len(list(student.module.parameters()))
    for a, b in zip(student.module.parameters(), teacher.module.parameters()):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_one_roles_init_does_not_move_anothers():
    alone = assemble(ROLES[:2], specs(), seed=3)["student"].state()
    beside = assemble(ROLES, specs(), seed=3)["student"].state()
    other_seed = assemble(ROLES, specs(), seed=4)["student"].state()
    assert all(torch.equal(alone[n], beside[n]) for n in alone)
    assert any(not torch.equal(alone[n], other_seed[n]) for n in alone)


def test_ema_follows_its_formula_and_is_used_within_the_block_only():
    handle = assemble(ROLES, specs(student={"ema": 0.9}), seed=0)["student"]
    name, parameter = next((n, p) for n, p in handle.trainable().items() if n.startswith("up."))
    parameter.data.fill_(1.0)
    handle.update_ema()
    torch.testing.assert_close(handle.ema[name], torch.full_like(parameter, 0.1))
    with handle.averaged():
        torch.testing.assert_close(handle.adapter.get_parameter(name).detach(), torch.full_like(parameter, 0.1))
    assert handle.adapter.get_parameter(name) is parameter and (parameter == 1).all()


def test_a_graph_built_outside_the_block_keeps_its_own_weights():
    """A consistency target is computed with the average between the student's forward and its backward."""
    handle = assemble(ROLES, specs(student={"tune": "full", "ema": 0.5}), seed=0)["student"]
    label = torch.zeros(3, dtype=torch.long)
    call = {"sample": torch.randn(3, 1, 8, 8), "timestep": torch.full((3,), 500.0), "class_labels": label}
    loss = handle(**call).sample.square().sum()
    with handle.averaged(), torch.no_grad():
        handle(**call)
    late = torch.autograd.grad(loss, list(handle.trainable().values()))
    early = torch.autograd.grad(handle(**call).sample.square().sum(), list(handle.trainable().values()))
    assert all(torch.equal(a, b) for a, b in zip(late, early))


def test_merged_uses_ema_weights_and_leaves_the_base_alone():
    handle = assemble(ROLES, specs(student={"ema": 0.5}), seed=0)["student"]
    before = handle.fingerprint()
    for p in handle.trainable().values():
        p.data.fill_(0.2)
    assert all(torch.equal(a, b) for a, b in zip(merged(handle).parameters(), handle.module.parameters())), (
        "the EMA's up-projections are still zero"
    )
    handle.update_ema()
    assert any(not torch.equal(a, b) for a, b in zip(merged(handle).parameters(), handle.module.parameters()))
    assert handle.fingerprint() == before


def test_pull_towards_keeps_the_share_it_is_told():
    handles = assemble(ROLES, specs(), seed=0)
    student, fake = handles["student"], handles["fake_score"]
    name = next(iter(student.trainable()))
    expected = 0.75 * fake.trainable()[name].detach() + 0.25 * student.trainable()[name].detach()
    fake.pull_towards(student, keep=0.75)
    torch.testing.assert_close(fake.trainable()[name].detach(), expected)
    fake.assign(student)
    assert torch.equal(fake.trainable()[name], student.trainable()[name])


def test_unlike_roles_cannot_be_pulled():
    handles = assemble(ROLES, specs(fake_score={"tune": "full"}), seed=0)
    with pytest.raises(UserError, match="tune both alike"):
        handles["fake_score"].pull_towards(handles["student"], 0.9)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"teacher": {}}, "role 'teacher' has no weights"),
        ({"teacher": {"from": "no/such/folder"}}, "no model folder 'no/such/folder'"),
        ({"teacher": {"from": "unet2d", "build": {"sample_sise": 8}}}, "did you mean 'sample_size'"),
        ({"teacher": {"from": "student"}}, "in a circle"),
    ],
)
def test_bad_sources_are_named(said, message):
    with pytest.raises(UserError, match=message):
        assemble(ROLES, {n: RoleSpec.model_validate(s) for n, s in said.items()}, seed=0)


def test_a_built_part_waits_for_the_roles_declared_before_it():
    seen = []

    def head(handles):
        seen.append(sorted(handles))
        return torch.nn.Linear(2, 2)

    roles = (Role("student", tune="lora", init="teacher"), Role("head", tune="full", build=head), Role("teacher"))
    assemble(roles, specs(), seed=0)
    assert seen == [["student", "teacher"]]


def test_a_recipe_that_says_how_weights_are_averaged_replaces_the_papers_other_way():
    """`ema` and `ema_half_life` are two ways of saying one thing, of which the recipe's counts."""
    paper = Role("student", defaults={"ema": 0.999})
    spec = merge_spec(paper, RoleSpec(ema_half_life=640))
    assert (spec.ema, spec.ema_half_life) == (None, 640)
    spec = merge_spec(Role("student", defaults={"ema_half_life": 640}), RoleSpec(ema=0.9))
    assert (spec.ema, spec.ema_half_life) == (0.9, None)
    assert merge_spec(paper, RoleSpec(ema=None)).ema is None


def test_a_base_that_is_not_trained_is_held_in_bfloat16_and_merged_in_float32():
    """Half the memory; the student's network is the base as it is held plus the change, without rounding it again."""
    teacher = TEACHER.model_copy(update={"weights": "bf16"})
    handles = assemble(ROLES, {"teacher": teacher}, seed=0)
    student, exact = handles["student"], assemble(ROLES, specs(), seed=0)["teacher"]
    assert student.narrow and {p.dtype for p in student.adapter.parameters()} == {torch.float32}
    for up in student.adapter.up.values():
        torch.nn.init.normal_(up.weight)
    whole = merged(student)
    for name, weight in exact.module.named_parameters():
        wanted = weight.bfloat16().float()
        key = name.removesuffix(".weight").replace(".", "/")
        if key in student.adapter.down:
            wanted = wanted + student.adapter.delta(key)
        assert torch.equal(whole.get_parameter(name), wanted)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([100.0, 900.0])
    handles["teacher"].autocast = exact.autocast = torch.bfloat16
    one, two = (h(x, t, class_labels=torch.tensor([1, 2])).sample for h in (handles["teacher"], exact))
    assert (one - two).norm() < 0.02 * two.norm()


@pytest.mark.parametrize(
    ("role", "said", "message"),
    [
        ("teacher", {"tune": "full"}, "too coarse for weights that are trained"),
        ("student", {}, "it starts from teacher, so say teacher.weights"),
    ],
)
def test_weights_that_are_trained_or_another_roles_are_not_held_in_bfloat16(role, said, message):
    """With the key to write."""
    given = specs()
    spec = given.get(role, RoleSpec())
    given[role] = spec.model_copy(update={"weights": "bf16", **said})
    with pytest.raises(UserError, match=message):
        assemble(ROLES, given, seed=0)
