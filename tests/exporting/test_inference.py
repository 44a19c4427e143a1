"""Attention and offloading of loaded pipelines: the images stay what they were, and nothing asked for is left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.pipelines import pipeline_utils
from PIL import Image

from fewstep.cli.main import main
from fewstep.errors import UserError
from fewstep.exporting.inference import set_attention, set_offload
from fewstep.exporting.pipeline import generate, load_pipeline
from tests.models.tiny_flux import TRANSFORMER

from .text_students import PROMPTS, text_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Stable Diffusion in two steps."""
    root = tmp_path_factory.mktemp("inference")
    return text_student(root / "base", steps=2, origin=50).export(root / "m")


def images(pipeline) -> torch.Tensor:
    """Of three prompts."""
    return generate(pipeline, 3, prompts=PROMPTS).images


@pytest.fixture
def flux():
    """A pipeline whose network can be told any backend; diffusers remembers the last one, so that it is reset."""
    torch.manual_seed(0)
    network = FluxTransformer2DModel(**TRANSFORMER)
    yield SimpleNamespace(transformer=network)
    network.reset_attention_backend()


def backends(network) -> set[str | None]:
    """That the layers are told."""
    found = [
        getattr(part.processor, "_attention_backend", None) for part in network.modules() if hasattr(part, "processor")
    ]
    return {None if backend is None else backend.value for backend in found}


@pytest.mark.parametrize(
    ("asked", "told"), [("sdpa", "native"), ("native", "native"), ("_native_math", "_native_math")]
)
def test_every_layer_is_told_the_backend(flux, asked, told):
    assert backends(flux.transformer) == {None}
    set_attention(flux, asked)
    assert backends(flux.transformer) == {told}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("sdap", "unknown attention 'sdap': did you mean 'sdpa'"),
        ("flash_hub", "fetches from the hub: it takes --trust-remote-code"),
        ("sage", "attention 'sage' cannot be had here: .*install `sageattention"),
        ("xformers", "attention 'xformers' cannot be had here: .*install `xformers"),
    ],
)
def test_backends_that_cannot_be_had_are_refused(flux, monkeypatch, asked, message):
    from diffusers.models import attention_dispatch

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", False)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", False)
    with pytest.raises(UserError, match=message):
        set_attention(flux, asked)
    assert backends(flux.transformer) == {None}


def test_a_unet_attends_by_sdpa_or_xformers_and_says_so_of_others(folder, monkeypatch):
    """diffusers would take any name of a backend and go on as before."""
    pipeline = load_pipeline(folder, device="cpu")
    assert torch.equal(images(load_pipeline(folder, device="cpu", attention="sdpa")), images(pipeline))
    with pytest.raises(UserError, match="UNet2DConditionModel has no attention backends: choose sdpa or xformers"):
        set_attention(pipeline, "_native_math")
    asked = []
    monkeypatch.setattr(pipeline, "enable_xformers_memory_efficient_attention", lambda: asked.append("xformers"))
    set_attention(pipeline, "xformers")
    assert asked == ["xformers"]


def test_an_offloaded_pipeline_makes_the_same_images(folder):
    """On the CPU both places are one, and accelerate moves the networks all the same."""
    pipeline = load_pipeline(folder, device="cpu", offload="model")
    assert all(hasattr(part, "_hf_hook") for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae))
    assert torch.equal(images(pipeline), images(load_pipeline(folder, device="cpu")))


def test_sequential_offloading_hooks_every_layer(folder):
    """accelerate cannot run it where both places are one."""
    pipeline = load_pipeline(folder, device="cpu", offload="sequential")
    layers = [part for part in pipeline.unet.modules() if list(part.parameters(recurse=False))]
    assert layers and all(part._hf_hook.offload and part.weight.device.type == "meta" for part in layers)


def test_offloading_names_what_is_missing(folder, monkeypatch):
    pipeline = load_pipeline(folder, device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="offload 'model' moves weights to a GPU and back, and there is none"):
        set_offload(pipeline, "model")
    with pytest.raises(UserError, match="unknown offload 'seqential': did you mean 'sequential'"):
        set_offload(pipeline, "seqential")
    monkeypatch.setattr(pipeline_utils, "is_accelerate_available", lambda: False)
    for how in ("model", "sequential"):
        with pytest.raises(UserError, match=f"offload '{how}' needs accelerate: pip install accelerate"):
            set_offload(pipeline, how, "cpu")


def test_the_command_passes_both_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def drawn(name: str, *words: str) -> bytes:
        file = tmp_path / f"{name}.png"
        assert main(["sample", str(folder), "--out", str(file), "-n", "2", "--prompt", "a cat", *words]) == 0
        return Image.open(file).tobytes()

    assert drawn("a") == drawn("b", "--attention", "sdpa")
    for words, message in ((["--offload", "model"], "no CUDA"), (["--attention", "flash"], "no attention backends")):
        assert main(["sample", str(folder), "-n", "1", "--prompt", "a cat", *words]) == 2
        assert message in capsys.readouterr().err
