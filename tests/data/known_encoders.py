"""Encoders whose answers are known, in the place of a pipeline's."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.data.batch import Cond

STD = 0.1


class Around:
    """Latents: means over 2 x 2 pixels, plus STD noise. Embeddings: the prompt's letters, times a weight."""

    def __init__(self, key="k"):
        self.weight, self.said, self.texts = nn.Parameter(torch.ones(())), key, []

    def encode(self, images, noise=None):
        mean = self.weight * nn.functional.avg_pool2d(images, 2)
        return mean if noise is None else mean + STD * noise

    def prompts(self, texts):
        self.texts.append(list(texts))
        letters = [[float(ord(c)) for c in text.ljust(12)[:12]] for text in texts]
        return Cond(prompt_embeds=self.weight * torch.tensor(letters)[:, :, None])

    def parts(self):
        raise AssertionError("data asks for no part by name: a folder without a VAE still encodes prompts")

    def key(self):
        return self.said
