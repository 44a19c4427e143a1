"""LoRA files load into peft and give the merged network."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open

from fewstep.exporting.lora import lora_config, lora_state, save_lora
from fewstep.nets.lora import Adapter

from .students import student


def _trained_adapter(module, targets, rank, alpha):
    adapter = Adapter(module, rank, alpha, targets)
    for part in adapter.up.values():
        torch.nn.init.normal_(part.weight, std=0.1)
    return adapter


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["*"]], ids=["attention", "all, with convolutions"])
def test_peft_computes_what_the_merged_network_does(targets):
    s = student("dit" if targets != ["*"] else "unet2d")
    adapter = _trained_adapter(s.module, targets, rank=6, alpha=9.0)  # some layers are too small for rank 6
    merged = copy.deepcopy(s.module)
    adapter.merge_into(merged)
    theirs = inject_adapter_in_model(LoraConfig(**lora_config(adapter)), copy.deepcopy(s.module))
    missing = set_peft_model_state_dict(theirs, lora_state(adapter))
    assert not missing.unexpected_keys and not [k for k in missing.missing_keys if "lora_" in k]
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([500.0, 20.0]), torch.tensor([0, 2])
    with torch.no_grad():
        ours, peft = merged(x, t, class_labels=y).sample, theirs(x, t, class_labels=y).sample
        base = s.module(x, t, class_labels=y).sample
    assert torch.allclose(ours, peft, atol=1e-5)
    assert not torch.allclose(ours, base, atol=1e-3)


def test_rank_alpha_and_schedule_are_in_the_metadata(tmp_path):
    s = student("dit")
    adapter = _trained_adapter(s.module, ["to_q"], rank=4, alpha=2.0)
    save_lora(adapter, "transformer", tmp_path / "f.safetensors", {"schedule": {"kind": "ode"}})
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    said = json.loads(metadata["lora_adapter_metadata"])
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (4, 2.0)
    assert json.loads(metadata["fewstep"]) == {"schedule": {"kind": "ode"}}
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    assert len(keys) == 2 * len(adapter.down)
