"""Where a model lies: a local folder, an asset that travels with fewstep, or the local Hugging Face cache.

Nothing is ever fetched: a model that is not here is an error that names the command which fetches it.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError
from ..resources import locate

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name


def find_model(source: str | Path) -> Path:
    """The folder of a model: a path, `shipped:NAME`, or a hub id whose snapshot is in the local cache.

    Raises UserError when it is nowhere here.
    """
    folder = local(source)
    if folder is None:
        raise UserError(_absent(str(source)))
    return folder


def local(source: str | Path) -> Path | None:
    """Like `find_model`, None when the model is nowhere here. A folder goes before a hub id of the same name."""
    folder = locate(source)
    return folder if folder.is_dir() else cached(str(source))


def cached(name: str) -> Path | None:
    """The newest snapshot of the hub id `name` in the local cache, or None. No network is used."""
    if _ID.fullmatch(name) is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def is_hub_id(source: object) -> bool:
    """Whether this is `owner/name`."""
    return isinstance(source, str) and _ID.fullmatch(source) is not None


def _absent(source: str) -> str:
    mend = "give the path of an exported model or of a pipeline saved by diffusers"
    if _ID.fullmatch(source) is None:
        return f"no model folder '{source}': {mend}"
    here = f"no model folder '{source}', and no such model in the local Hugging Face cache"
    return f"{here}: {mend}, or fetch it with `hf download {source}`"
