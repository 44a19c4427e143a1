"""The class-conditional few-step pipeline, with nothing but diffusers around it."""

from __future__ import annotations

import ast
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    UNet2DModel,
)
from fewstep_pipelines import FewStepClassPipeline, pipeline_fewstep_class_v1

LABELS = [0, 2]


def _unet(classes: int | None = 3) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
        num_class_embeds=None if classes is None else classes + 1,
    ).eval()


def _dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=3,
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net.eval()


def _pipe(network=None, scheduler=None, **more) -> FewStepClassPipeline:
    network = network or _unet()
    part = "unet" if isinstance(network, UNet2DModel) else "transformer"
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = FewStepClassPipeline(scheduler=scheduler, **{part: network}, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run(pipe, **asked):
    asked = {"class_labels": LABELS, "latents": _noise(2, pipe), "output_type": "pt", **asked}
    return pipe(**asked).images


def _noise(rows, pipe):
    return torch.randn(rows, pipe.network.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))


def _pixels(x):
    return (x / 2 + 0.5).clamp(0, 1)


def test_the_file_imports_torch_diffusers_and_the_standard_library_only():
    tree = ast.parse(Path(pipeline_fewstep_class_v1.__file__).read_text())
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", "diffusers"}
    assert all(n.level == 0 for n in imports if isinstance(n, ast.ImportFrom))


def test_flow_sampling_is_euler_on_the_shifted_grid():
    pipe = _pipe()
    x, levels = _noise(2, pipe), [1.0, 0.9, 0.75, 0.5, 0.0]  # shift 3 of 1, 3/4, 1/2, 1/4
    with torch.no_grad():
        for t, following in pairwise(levels):
            x = x + (following - t) * pipe.unet(x, 1000 * t, class_labels=torch.tensor(LABELS)).sample
    assert torch.allclose(_run(pipe, num_inference_steps=4), _pixels(x), atol=1e-6)


def test_guidance_mixes_the_null_class_in_one_call():
    pipe, calls = _pipe(), []
    pipe.unet.register_forward_pre_hook(lambda m, a, k: calls.append(k["class_labels"].tolist()), with_kwargs=True)
    images = _run(pipe, num_inference_steps=1, guidance_scale=2.5)
    assert calls == [[3, 3, 0, 2]]
    x = _noise(2, pipe)
    with torch.no_grad():
        free, tied = (pipe.unet(x, 1000.0, class_labels=torch.tensor(y)).sample for y in ([3, 3], LABELS))
    assert torch.allclose(images, _pixels(x - free - 2.5 * (tied - free)), atol=1e-6)


def test_learned_variance_is_cut_off_and_latents_are_decoded():
    torch.manual_seed(1)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    pipe = _pipe(_dit(), vae=vae)
    images = _run(pipe, num_inference_steps=1)
    x = _noise(2, pipe)
    with torch.no_grad():
        out = pipe.transformer(x, torch.tensor([1000.0, 1000.0]), class_labels=torch.tensor(LABELS)).sample
        wanted = _pixels(vae.decode((x - out[:, :2]) / 0.5 + 0.25).sample)
    assert images.shape == (2, 1, 16, 16)
    assert torch.allclose(images, wanted, atol=1e-6)


def test_steps_and_guidance_travel_with_the_folder(tmp_path):
    pipe = _pipe(default_steps=2, default_guidance_scale=1.5)
    wanted = _run(pipe, num_inference_steps=2, guidance_scale=1.5)
    assert torch.equal(_run(pipe), wanted)
    pipe.save_pretrained(tmp_path / "m")
    loaded = FewStepClassPipeline.from_pretrained(tmp_path / "m")
    assert (loaded.config["default_steps"], loaded.config["default_guidance_scale"]) == (2, 1.5)
    assert torch.equal(_run(loaded), wanted)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where diffusers copies a folder's code before running it; it keeps the module of an earlier test otherwise."""
    monkeypatch.delitem(sys.modules, "diffusers_modules.local.pipeline_fewstep_class_v1", raising=False)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_diffusers_runs_the_folders_file_with_the_flag_only(tmp_path, cache):
    pipe = _pipe()
    pipe.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "pipeline_fewstep_class_v1.py"
    file.write_text(file.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "m")
    assert not cache.exists() and not (tmp_path / "ran").exists()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert type(loaded) is not FewStepClassPipeline and (tmp_path / "ran").exists()
    assert torch.equal(_run(loaded), _run(pipe))


def test_the_installed_class_loads_the_folder_without_flag_and_without_its_file(tmp_path):
    pipe = _pipe()
    pipe.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "pipeline_fewstep_class_v1.py"
    file.write_text("raise SystemExit('run')")
    assert torch.equal(_run(FewStepClassPipeline.from_pretrained(tmp_path / "m")), _run(pipe))
    file.unlink()
    assert torch.equal(_run(FewStepClassPipeline.from_pretrained(tmp_path / "m")), _run(pipe))


def test_a_folder_saved_again_carries_the_file_again(tmp_path, cache):
    _pipe().save_pretrained(tmp_path / "a")
    DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "model_index.json").read_text())["_class_name"] == [
        "pipeline_fewstep_class_v1",
        "FewStepClassPipeline",
    ]
    files = [(tmp_path / name / "pipeline_fewstep_class_v1.py").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("scheduler", "fed"),
    [
        (FlowMatchEulerDiscreteScheduler(), [1000, 750, 500, 250]),
        (FlowMatchLCMScheduler(shift=3.0), [1000, 900, 750, 500]),
        (FlowMapEulerDiscreteScheduler(), [1000, 750, 500, 250]),  # its step takes no generator
        (DDIMScheduler(timestep_spacing="trailing", clip_sample=False), [999, 749, 499, 249]),
        (LCMScheduler(original_inference_steps=4), [999, 749, 499, 249]),
    ],
    ids=lambda v: type(v).__name__ if hasattr(v, "step") else "",
)
def test_few_step_schedulers_feed_their_grid(scheduler, fed):
    pipe, seen = _pipe(scheduler=scheduler), []
    pipe.unet.register_forward_pre_hook(lambda m, a, k: seen.append(float(k["timestep"][0])), with_kwargs=True)
    images = _run(pipe, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert seen == pytest.approx(fed)
    assert torch.isfinite(images).all()


def test_schedulers_that_scale_their_input_are_obeyed():
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    pipe, seen = _pipe(scheduler=scheduler), []
    pipe.unet.register_forward_pre_hook(lambda m, a, k: seen.append(a[0].std().item()), with_kwargs=True)
    _run(pipe, num_inference_steps=1)
    assert scheduler.init_noise_sigma > 5
    assert seen[0] == pytest.approx(_noise(2, pipe).std().item(), rel=0.01)


def test_one_generator_an_image_makes_it_independent_of_its_batch():
    pipe = _pipe(scheduler=FlowMatchLCMScheduler())

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipe([0, 2], generator=generators(5, 6), output_type="pt").images
    alone = pipe([2], generator=generators(6), output_type="pt").images
    assert torch.allclose(both[1:], alone, atol=1e-5)
    with pytest.raises(ValueError, match="1 generators do not fit 2"):
        pipe([0, 2], generator=generators(5))


def test_labels_come_as_number_list_tensor_or_not_at_all():
    pipe = _pipe()
    assert torch.equal(_run(pipe, class_labels=torch.tensor(LABELS)), _run(pipe))
    assert torch.equal(_run(pipe, class_labels=1, batch_size=2), _run(pipe, class_labels=[1, 1]))
    drawn = [pipe._labels(None, 64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0].tolist()) == {0, 1, 2}  # never the null class
    with pytest.raises(ValueError, match="does not fit 2 class labels"):
        _run(pipe, batch_size=3)


def test_an_unconditional_network_needs_no_labels():
    pipe = _pipe(_unet(classes=None))
    assert pipe(batch_size=3, output_type="pt", num_inference_steps=1).images.shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="no classes"):
        pipe(class_labels=[0])
    with pytest.raises(ValueError, match="needs a network with classes"):
        pipe(guidance_scale=2.0)


def test_output_types_hold_the_same_picture():
    pipe = _pipe()
    pt, np, pil = (_run(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert torch.equal(torch.from_numpy(np).permute(0, 3, 1, 2), pt)
    assert (pil[0].size, pil[0].mode) == ((8, 8), "L")
    grey = (pt[0, 0] * 255).round().to(torch.uint8)
    assert numpy.asarray(pil[0]).tolist() == grey.tolist()
    assert torch.equal(_run_tuple(pipe)[0], pt)
    with pytest.raises(ValueError, match="output_type='latent'"):
        _run(pipe, output_type="latent")


def _run_tuple(pipe):
    return pipe(LABELS, latents=_noise(2, pipe), output_type="pt", return_dict=False)


def test_the_callback_sees_every_step_and_may_change_it():
    pipe, seen = _pipe(), []

    def callback(given, i, t, tensors):
        seen.append((given is pipe, i, float(t)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = _run(pipe, num_inference_steps=2, callback_on_step_end=callback)
    assert seen == [(True, 0, 1000.0), (True, 1, 750.0)]
    assert torch.equal(images, torch.full_like(images, 0.5))


def test_wrong_noise_and_wrong_networks_are_refused():
    with pytest.raises(ValueError, match=r"latents have shape \(2, 3, 8, 8\), the network wants \(2, 1, 8, 8\)"):
        _run(_pipe(), latents=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="exactly one"):
        FewStepClassPipeline(scheduler=LCMScheduler())
    with pytest.raises(ValueError, match="exactly one"):
        FewStepClassPipeline(scheduler=LCMScheduler(), unet=_unet(), transformer=_dit())


def test_a_network_in_half_precision_is_stepped_in_float32():
    pipe = _pipe(_unet().to(torch.bfloat16))
    dtypes = []

    def callback(_pipe, i, t, tensors):
        dtypes.append(tensors["latents"].dtype)
        return {}

    assert (_run(pipe, callback_on_step_end=callback) - _run(_pipe())).abs().mean() < 0.02
    assert set(dtypes) == {torch.float32}
