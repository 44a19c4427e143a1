"""A tiny folder of captioned pictures for tests: real handwritten digits, enlarged and in RGB."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from fewstep.data.images import to_uint8
from fewstep.data.registry import make_source

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def tiny_captions(folder: Path, n: int = 8, size: int = 16) -> Path:
    """Writes n pictures [3, size, size] as 000.png ... with captions ("digit seven") in metadata.jsonl."""
    rows = make_source({"source": "digits"}).fetch(torch.arange(n), None)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (picture, label) in enumerate(zip(to_uint8(rows["x0"])[:, 0], rows["cond"]["label"].tolist())):
        large = Image.fromarray(picture.numpy()).resize((size, size), Image.Resampling.BICUBIC)
        large.convert("RGB").save(folder / f"{i:03d}.png")
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": f"digit {NAMES[label]}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
