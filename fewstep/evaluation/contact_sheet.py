"""A page of thumbnails to look at before believing any number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CELL, COLUMNS, MOST = 160, 6, 24
_CAPTION = 28  # pixels for two lines
_LETTERS = 26  # that fit into a cell


def contact_sheet(
    files: Sequence[Path], texts: Sequence[str] | None, out: Path, most: int = MOST, columns: int = COLUMNS
) -> Path:
    """Writes `out`: at most `most` of the pictures, at equal distances, each with its number and prompt."""
    from PIL import Image, ImageDraw

    n = min(most, len(files))
    chosen = [i * len(files) // n for i in range(n)]
    rows = -(-n // columns)
    page = Image.new("RGB", (min(columns, n) * CELL, rows * (CELL + _CAPTION)), "white")
    pen = ImageDraw.Draw(page)
    for place, i in enumerate(chosen):
        x, y = place % columns * CELL, place // columns * (CELL + _CAPTION)
        with Image.open(files[i]) as opened:
            picture = opened.convert("RGB")
        larger = Image.Resampling.NEAREST if max(picture.size) < CELL else Image.Resampling.LANCZOS
        scale = (CELL - 4) / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        page.paste(picture.resize(size, larger), (x + 2, y + 2))
        pen.multiline_text((x + 2, y + CELL), _caption(i, texts), fill="black", spacing=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out)
    return out


def _caption(i: int, texts: Sequence[str] | None) -> str:
    words = f"{i} {texts[i] if texts is not None else ''}".encode("latin-1", "replace").decode("latin-1")
    return f"{words[:_LETTERS]}\n{words[_LETTERS : 2 * _LETTERS]}"
