"""Proteina's network against the layout of its released weights, and their conversion."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep_pipelines import ProteinaTransformer
from safetensors.torch import save_file

from fewstep.cli.main import main
from fewstep.data.batch import Cond
from fewstep.errors import UserError
from fewstep.models.folder import open_model
from fewstep.models.proteina import PROTEINA, SIZES, load_proteina

from .proteina_reference import CLASSES, random_weights, velocity

ORDER = ("index", "x_self", "broken")


def chains() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, tau, mask): two chains, one of them padded."""
    draw = torch.Generator().manual_seed(1)
    mask = torch.arange(9)[None] < torch.tensor([[9], [6]])
    return torch.randn(2, 9, 3, generator=draw) * mask[..., None], torch.tensor([0.3, 0.9]), mask


def released(folder, prefix="", change=None, **more):
    """A file with the released names."""
    weights = {**random_weights(prefix), **more}
    for name in change or ():
        del weights[name]
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.mark.parametrize("prefix", ("", "nn.", "module.model.nn."))
@pytest.mark.parametrize("told", ((), ("x_self",), ("broken",), ("labels",), ("x_self", "broken", "labels")))
@torch.no_grad()
def test_released_weights_give_the_released_networks_answers(tmp_path, prefix, told):
    """Against the reference, whatever the network is told; labels count from 0 there and from 1 here."""
    network = load_proteina(released(tmp_path, prefix), order=ORDER).module
    (x, tau, mask), labels = chains(), torch.tensor([[0, 2, 1], [1, 0, 4]])
    broken = torch.zeros(2, 9, dtype=torch.bool)
    broken[0, 3] = True
    known = {"x_self": x.roll(1, 0) * mask[..., None], "broken": broken, "labels": labels}
    theirs = velocity(random_weights(), x, tau, mask, **{name: known[name] for name in told})
    cath = torch.where(labels == torch.tensor(CLASSES), 0, labels + 1)
    ours = {("cath" if name == "labels" else name): cath if name == "labels" else known[name] for name in told}
    u = network(x, tau, mask, **ours)
    torch.testing.assert_close(u, theirs, atol=2e-5, rtol=1e-4)
    assert u.abs().max() > 0.1 and not u[1, 6:].any()


@torch.no_grad()
def test_the_order_of_features_is_that_of_the_released_size_or_said(tmp_path):
    """The smaller released network reads chain breaks before the predicted chain; of other sizes nobody knows."""
    file, (x, tau, mask) = released(tmp_path), chains()
    known = {"x_self": x, "broken": mask.roll(2, 1)}
    theirs = velocity(random_weights(), x, tau, mask, order="breaks first", **known)
    network = load_proteina(file, order=("index", "broken", "x_self")).module
    torch.testing.assert_close(network(x, tau, mask, **known), theirs, atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="16 channels, as no released network: say its --order"):
        load_proteina(file)
    with pytest.raises(UserError, match="order=index,breaks: write"):
        load_proteina(file, order=("index", "breaks"))


def test_sizes_are_read_off_the_weights(tmp_path):
    """All of them."""
    config = load_proteina(released(tmp_path), order=ORDER).module.config
    found = {name: config[name] for name in ("width", "num_layers", "num_heads", "pair_width", "registers")}
    assert found == {"width": 16, "num_layers": 2, "num_heads": 2, "pair_width": 8, "registers": 3}
    assert (config.index_width, config.time_width, config.fold_width, config.cond_width) == (12, 8, 6, 10)
    assert tuple(config.cath_classes) == CLASSES


def test_files_that_do_not_fit_are_refused_with_the_reason(tmp_path):
    """Rather than loaded wrongly."""
    cases = [
        ({"more.weight": torch.zeros(2)}, (), "1 weights that are unknown here, e.g. more.weight"),
        ({"pair_update_layers.0.linear_x.weight": torch.zeros(2)}, (), "triangle layers.*no_tri"),
        ({}, ("coors_3d_decoder.1.weight",), "output.weight is missing"),
        ({}, ("registers", "pair_repr_builder.init_repr_factory.ln_out.weight"), "not whole: 'pairs.norm.weight'"),
        ({"coors_3d_decoder.1.weight": torch.zeros(4, 16)}, (), r"output.weight has shape \(4, 16\), not \(3, 16\)"),
        ({}, ("linear_3d_embed.weight",), "holds no network of Proteina's code"),
        ({"ema.linear_3d_embed.weight": torch.zeros(16, 3)}, (), "several networks: choose one with --prefix"),
    ]
    for more, gone, said in cases:
        with pytest.raises(UserError, match=said):
            load_proteina(released(tmp_path, change=gone, **more), order=ORDER)
    pickled = tmp_path / "w.ckpt"
    torch.save(random_weights(), pickled)
    with pytest.raises(UserError, match="pickles are never loaded"):
        load_proteina(pickled)
    (tmp_path / "bad.safetensors").write_text("text")
    with pytest.raises(UserError, match="cannot read"):
        load_proteina(tmp_path / "bad.safetensors")
    assert load_proteina(released(tmp_path, **{"disc_head.0.x": torch.zeros(1)}), order=ORDER)


@pytest.mark.parametrize("steps", (None, 1, 4))
def test_converted_weights_are_a_pipeline_folder_with_their_sampler(tmp_path, steps, capsys):
    """A teacher has its stochastic sampler in 400 steps, a distilled network its grid; both train and sample here."""
    words = ["convert", str(released(tmp_path)), "--to", str(tmp_path / "m"), "--order", ",".join(ORDER)]
    assert main([*words, *([] if steps is None else ["--steps", str(steps)])]) == 0
    card = json.loads((tmp_path / "m" / "fewstep.json").read_text())
    assert card["scheduler"] == ("FlowMatchProteinSDEScheduler" if steps is None else "FlowMatchProteinScheduler")
    assert card["schedule"]["noise_scale"] == 0.45 and len(card["schedule"]["u"]) == (steps or 400)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "m", trust_remote_code=True)
    made = pipeline(lengths=[9, 6], num_inference_steps=steps or 5, generator=torch.Generator().manual_seed(0))
    assert made.coords_nm.shape == (2, 9, 3) and made.coords_nm.isfinite().all()
    if steps == 1:
        pipeline.scheduler.set_timesteps(1)
        assert pipeline.scheduler.timesteps.tolist() == pytest.approx([0.631], abs=1e-4)
    loaded = open_model(tmp_path / "m")
    assert loaded.family == "proteina" and loaded.module.config.num_layers == 2


@torch.no_grad()
def test_the_family_answers_minus_the_velocity_and_starts_at_zero():
    """As `protein_flow`."""
    module = PROTEINA.build(size="tiny").module
    x, tau, mask = chains()
    cond = Cond(mask=mask)
    assert not module(x, tau, mask).any()
    torch.nn.init.normal_(module.output.weight)
    said = PROTEINA.pack(module, x, 1 - tau, cond)
    assert torch.equal(PROTEINA.unpack(module, module(**said), x), -module(x, said["tau"], mask))
    deaf = PROTEINA.build(size="tiny", self_conditioning=False).module
    torch.nn.init.normal_(deaf.output.weight)
    assert torch.equal(deaf(x, tau, mask, x_self=x), deaf(x, tau, mask))


def test_checkpointing_leaves_gradients_alone():
    """Layers are run again in the backward pass, with the same result."""
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        module = PROTEINA.build(size="tiny").module.train()
        torch.nn.init.normal_(module.output.weight)
        if on:
            module.enable_gradient_checkpointing()
        module(*chains()).square().sum().backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 40
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("size", "millions"), (("60m", 64.2), ("200m", 190.3)))
def test_the_released_sizes(size, millions):
    """Without fold labels, which the released ones have."""
    with torch.device("meta"):
        module = PROTEINA.build(size=size).module
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == millions


def test_unknown_sizes_name_the_nearest():
    """As every family."""
    assert set(SIZES) == {"tiny", "60m", "200m"}
    with pytest.raises(UserError, match="60m"):
        PROTEINA.build(size="60M")


@torch.no_grad()
def test_bfloat16_runs():
    """Within its precision."""
    x, tau, mask = chains()
    network = ProteinaTransformer(16, 2, 2, 8, 2, 8, 8, 8, 16)
    torch.nn.init.normal_(network.output.weight)
    u = network(x, tau, mask)
    half = network.to(torch.bfloat16)(x.bfloat16(), tau, mask)
    assert half.dtype == torch.bfloat16 and (half.float() - u).abs().max() < 0.1 * u.abs().max()
