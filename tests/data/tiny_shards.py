"""Tar shards of the pictures of `tiny_captions`, written by the standard library."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.data.tiny_captions import tiny_captions


def pack(shard: Path, members: Mapping[str, bytes]) -> Path:
    """Writes the members in their order."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return shard


def tiny_shards(folder: Path, per_shard: Sequence[int] = (5, 3), as_json: bool = False) -> Path:
    """Shards train-0.tar ... with that many pictures each, captioned in .txt or .json members; the folder of pictures
    they were made from is `folder/pictures`."""
    pictures = tiny_captions(folder / "pictures", sum(per_shard))
    said = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    start = 0
    for number, n in enumerate(per_shard):
        members: dict[str, bytes] = {}
        for line in said[start : start + n]:
            stem = line["file_name"].removesuffix(".png")
            members[line["file_name"]] = (pictures / line["file_name"]).read_bytes()
            text = json.dumps({"caption": line["text"], "width": 16}) if as_json else line["text"] + "\n"
            members[f"{stem}.{'json' if as_json else 'txt'}"] = text.encode()
        pack(folder / f"train-{number}.tar", members)
        start += n
    return folder
