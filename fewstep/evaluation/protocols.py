"""Protocols as data: a YAML file says prompts, count, size, metrics, resize, reference and seed, and nothing else decides.

    like: coco2014-30k                      # optional: the protocol that says what is not said here
    prompts: {path: captions.txt, sha256: ...}
    n: 30000
    resize: {size: 256, filter: lanczos}    # of generated and real images alike
    metrics: {fid: {features: inception}, clip_score: {model: ViT-g-14}}
    reference: {path: val2014, count: 40504}

Relative paths are looked for where the command runs, beside the YAML file, and in `$FEWSTEP_DATA` (default
`~/.cache/fewstep/data`). Nothing is fetched: `fetch` is what the error says when a file is missing.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UserError, nearest
from ..models.build import parse
from ..resources import config
from .latency import LatencySpec
from .prompt_sets import PromptSet, read_prompts


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class PromptsSpec(_Spec):
    """Where the prompts lie, see `prompt_sets` for the forms."""

    path: str
    sha256: str | None = Field(default=None, description="of the file; checked")
    count: int | None = Field(default=None, description="how many there are; checked")
    duplicates: bool = Field(default=False, description="a prompt may come twice, as captions do")
    fetch: str = Field(default="", description="how to get the file, for the error when it is missing")


class ResizeSpec(_Spec):
    """Centre crop to the short edge, then Pillow's resize to a square; of images that have that size already: nothing."""

    size: int = Field(gt=0)
    filter: Literal["lanczos", "bicubic", "bilinear"] = "bicubic"

    @property
    def words(self) -> str:
        """As a score's protocol says it."""
        return f"centre crop, {self.filter} to {self.size}"


class ReferenceSpec(_Spec):
    """A folder of real images, or statistics of their features."""

    path: str
    count: int | None = Field(default=None, description="how many images there are; checked")
    sha256: str | None = Field(default=None, description="of a statistics file; checked")
    fetch: str = ""


class ProtocolFile(_Spec):
    """What a protocol's YAML file may say."""

    name: str = ""
    about: str = Field(default="", description="what it is, and what its numbers do not compare with")
    prompts: PromptsSpec | None = Field(default=None, description="None: a model of classes, or without conditions")
    n: int | None = Field(default=None, ge=2, description="prompts that are used; default all")
    per_prompt: int = Field(default=1, ge=1, description="images of each prompt; scores are averaged over them first")
    size: int | None = Field(default=None, gt=0, description="side of the generated images, checked; None: native")
    seed: int = Field(default=0, description="image i starts from noise (seed, i)")
    metrics: dict[str, dict[str, Any] | str | None]
    resize: ResizeSpec | None = None
    reference: ReferenceSpec | dict[str, Any] | None = Field(
        default=None, description="`{path: ...}`, or a data source, `{source: digits}`"
    )
    latency: LatencySpec | None = None
    folder: Path | None = Field(default=None, exclude=True, description="where the file lies; set by the reader")

    def locate(self, path: str) -> Path | None:
        """The path here, beside the YAML file or in the data folder; None when it is nowhere."""
        places = [Path(path).expanduser(), data_folder() / path]
        if self.folder is not None:
            places.insert(1, self.folder / path)
        return next((place for place in places if place.exists()), None)

    def need(self, path: str, what: str, fetch: str, option: str) -> Path:
        """Like `locate`; UserError that says how to get what is missing, and where to put it."""
        found = self.locate(path)
        if found is None:
            how = fetch or "get it"
            raise UserError(
                f"{self.name}: {what} are missing: {how}, put it at '{data_folder() / path}', or give {option}"
            )
        return found

    def read_prompts(self) -> PromptSet | None:
        """The prompts that are used, each `per_prompt` times; None when there are none.

        UserError when the file is missing, another, or holds another number, or a prompt twice.
        """
        said = self.prompts
        if said is None:
            return None
        file = self.need(said.path, "prompts", said.fetch, "--prompts FILE")
        check_sha256(file, said.sha256, f"{self.name}: prompts")
        found = read_prompts(file)
        if said.count is not None and len(found) != said.count:
            raise UserError(
                f"{self.name}: '{file}' holds {len(found):,} prompts, not {said.count:,}: {said.fetch or 'fetch it anew'}"
            )
        used = found.first(self.n or len(found))
        if not said.duplicates:
            used.refuse_duplicates()
        return used.pick(i for i in range(len(used)) for _ in range(self.per_prompt))


def data_folder() -> Path:
    """Where prompts and references of protocols are looked for: `$FEWSTEP_DATA`, else `~/.cache/fewstep/data`."""
    return Path(os.environ.get("FEWSTEP_DATA") or Path.home() / ".cache/fewstep/data")


def protocol_names() -> list[str]:
    """The protocols that travel with fewstep."""
    return sorted(file.stem for file in config("evaluation").glob("*.yaml"))


def load_protocol(name: str | Path) -> ProtocolFile:
    """The shipped protocol of that name, or that of a YAML file. UserError for an unknown name, key or value."""
    said, file = _read(str(name), ())
    return parse(ProtocolFile, {"name": file.stem, **said, "folder": file.parent}, f"protocol {file.name}")


def changed(protocol: ProtocolFile, **given: Any) -> ProtocolFile:
    """The protocol with some fields set anew; None leaves a field as it is. UserError for a wrong value."""
    new = {key: value for key, value in given.items() if value is not None}
    kept = {key: getattr(protocol, key) for key in ProtocolFile.model_fields}
    return parse(ProtocolFile, {**kept, **new}, f"protocol {protocol.name}") if new else protocol


def check_sha256(file: Path, expected: str | None, what: str) -> None:
    """UserError when the file's sha256 is not the expected one; None is not checked."""
    if expected is None:
        return
    made = hashlib.sha256()
    with file.open("rb") as stream:
        for part in iter(lambda: stream.read(2**20), b""):
            made.update(part)
    if made.hexdigest() != expected:
        raise UserError(f"{what}: '{file}' has sha256 {made.hexdigest()[:12]}, not {expected[:12]}: fetch it anew")


def _read(name: str, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Path]:
    """What the file says on top of what it is like, and the file."""
    file = _file(name, seen[-1].parent if seen else None)
    if file in seen:
        raise UserError(f"protocol {file.name} is like itself: remove `like: {name}`")
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"protocol {file.name} is no YAML: {' '.join(str(error).split())[:120]}") from None
    if not isinstance(said, dict):
        raise UserError(f"protocol {file.name} holds no mapping: write `metrics: ...` and the other keys")
    like = said.pop("like", None)
    return ({**_read(str(like), (*seen, file))[0], **said} if like else said), file


def _file(name: str, beside: Path | None) -> Path:
    shipped, given = config(f"evaluation/{name}.yaml"), Path(name)
    if given.suffix in (".yaml", ".yml"):
        found = next((p for p in (given, *([beside / given] if beside else ())) if p.is_file()), None)
        if found is None:
            raise UserError(f"no protocol file '{name}'")
        return found.resolve()
    if not shipped.is_file():
        raise UserError(f"unknown protocol '{name}': {nearest(name, protocol_names())} or give a .yaml file")
    return shipped
