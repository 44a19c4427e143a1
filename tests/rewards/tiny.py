"""Tiny random judges in the form their big ones are published in."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

PROMPTS = ["a red cat", "two dogs", "a blue house by the sea"]
WORDS = 514


def images(rows=3, channels=3, height=24, width=24, seed=0):
    """Smooth pictures in whole grey levels, [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(rows, channels, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).round() / 127.5 - 1


def clip_config(act="quick_gelu", image=16, heads=4, projection=8):
    shared = {"num_hidden_layers": 2, "num_attention_heads": heads, "hidden_act": act, "projection_dim": projection}
    text = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": WORDS, "max_position_embeddings": 20}
    vision = {"hidden_size": 48, "intermediate_size": 64, "image_size": image, "patch_size": 8}
    ends = {"bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1}
    return CLIPConfig(text_config=text | shared | ends, vision_config=vision | shared, projection_dim=projection)


def clip(folder: Path, seed=0, **sizes):
    """A random CLIPModel, saved with a tokenizer of single letters."""
    torch.manual_seed(seed)
    model = CLIPModel(clip_config(**sizes)).eval()
    randomise(model)
    model.save_pretrained(folder)
    clip_tokenizer(folder)
    return model


@torch.no_grad()
def randomise(model):
    """Weights so large that images differ well above rounding, and biases that are not 0, so that a lost one shows."""
    for name, p in model.named_parameters():
        if "position" in name or "class_embedding" in name or p.ndim == 1:
            p.add_(0.1 * torch.randn_like(p))
        elif p.ndim > 1:
            p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)


def clip_tokenizer(folder: Path):
    """Every letter is a token, once inside of a word and once at its end."""
    letters = [chr(i) for i in range(33, 127)]
    letters += [chr(0x100 + i) for i in range((WORDS - 2) // 2 - len(letters))]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def to_open_clip(state):
    """A CLIPModel's weights under open_clip's names: the way there, written apart from the way back."""
    out = {
        "logit_scale": state["logit_scale"],
        "visual.proj": state["visual_projection.weight"].T.contiguous(),
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    out |= {f"{a}.{kind}": state[f"{b}.{kind}"] for a, b in norms.items() for kind in ("weight", "bias")}
    for prefix, tower in (("visual.", "vision_model"), ("", "text_model")):
        layers = {name.split(".")[3] for name in state if name.startswith(f"{tower}.encoder.layers.")}
        for n in layers:
            mine, theirs = f"{prefix}transformer.resblocks.{n}", f"{tower}.encoder.layers.{n}"
            for kind in ("weight", "bias"):
                qkv = [state[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in ("q", "k", "v")]
                out[f"{mine}.attn.in_proj_{kind}"] = torch.cat(qkv)
                out[f"{mine}.attn.out_proj.{kind}"] = state[f"{theirs}.self_attn.out_proj.{kind}"]
                out[f"{mine}.ln_1.{kind}"] = state[f"{theirs}.layer_norm1.{kind}"]
                out[f"{mine}.ln_2.{kind}"] = state[f"{theirs}.layer_norm2.{kind}"]
                out[f"{mine}.mlp.c_fc.{kind}"] = state[f"{theirs}.mlp.fc1.{kind}"]
                out[f"{mine}.mlp.c_proj.{kind}"] = state[f"{theirs}.mlp.fc2.{kind}"]
    return {name: tensor.detach().clone().contiguous() for name, tensor in out.items()}
