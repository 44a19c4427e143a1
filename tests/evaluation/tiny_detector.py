"""A tiny random Mask2Former for COCO's instances, in the form the big ones are published in."""

from pathlib import Path

import torch

from fewstep.evaluation.geneval_files import CLASSES
from fewstep.models.quiet import quiet

_OWN = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
COCO = tuple(_OWN.get(name, name) for name in CLASSES)  # its own names


def mask2former(folder: Path, names=COCO, queries=12):
    """A random network whose scores and masks differ, saved."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    widths = {key: 32 for key in ("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward")}
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=swin,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=queries,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        **widths,
    )
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and ("class_predictor" in name or "mask_embedder" in name or "queries" in name):
                p.normal_()
    with quiet():
        model.save_pretrained(folder)
    return model
