"""Captioned pictures in a data set of Hugging Face's library `datasets`: local files, or the local cache."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from ..errors import UserError, nearest
from .pictures import Pictures, PicturesConfig
from .source import digest

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves in a folder


class HubDatasetConfig(PicturesConfig):
    """`{source: datasets, path: OWNER/NAME, split: train, image: image, caption: text, size: 512}`."""

    path: str = Field(description="folder of save_to_disk, folder or glob of parquet, json or csv files, or OWNER/NAME")
    split: str = "train"
    subset: str | None = Field(default=None, description="configuration of a data set that has several")
    image: str = Field(default="image", description="column of the pictures, or of the paths of their files")
    caption: str = Field(default="text", description="column of the captions")
    download: bool = Field(default=False, description="fetch OWNER/NAME from the hub when it is not in the local cache")


class HubDataset(Pictures):
    """Rows are those of `Pictures`, in the data set's own order. Its pictures stay encoded until they are fetched.

    Nothing comes from the network without `download: true`. Paths in json and csv files start at the file's folder.
    """

    Config = HubDatasetConfig
    kind = "datasets"

    def __init__(self, **config: Any):
        super().__init__(**config)
        found, self.root = open_dataset(self.config)
        self._serve(found, range(len(found)))
        if not len(self):
            raise UserError(f"datasets: the split '{self.config.split}' of '{self.config.path}' is empty")
        if self.config.skip_corrupt:
            self._serve(found, self.sound(len(self)))
        self.hold()

    def __len__(self) -> int:
        return len(self._pictures)

    def picture(self, i: int) -> Path | bytes:
        """Bytes of the picture, or its file."""
        cell = self._pictures[i][self.config.image] or {}
        return cell["bytes"] if cell.get("bytes") is not None else self.root / (cell.get("path") or "")

    def caption(self, i: int) -> str:
        """The text of the row; UserError when there is none."""
        text = self._captions[i][self.config.caption]
        if not isinstance(text, str):
            raise UserError(
                f"datasets: '{self.called(i)}' has no text in '{self.config.caption}': name another `caption`, or set "
                "`skip_corrupt: true`"
            )
        return text

    def called(self, i: int) -> str:
        """Name of the data set, and the row in its split."""
        return f"{self.config.path}[{self._numbers[i]}]"

    def content_key(self) -> str:
        """Digest of the sizes and of the library's own fingerprint, which follows files and rows."""
        return digest(self._said(), self._pictures._fingerprint, self._captions._fingerprint)

    def _serve(self, rows: Any, numbers: Sequence[int]) -> None:
        """Keeps these rows' two columns apart, so that to read a caption is not to read its picture."""
        import datasets

        for said, column in (("image", self.config.image), ("caption", self.config.caption)):
            if column not in rows.column_names:
                hint = nearest(column, rows.column_names)
                raise UserError(f"datasets: '{self.config.path}' has no column '{column}': set `{said}`; {hint}")
        try:
            pictures = rows.select_columns([self.config.image])
            encoded = pictures.cast_column(self.config.image, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError):
            kind = rows.features[self.config.image]
            raise UserError(f"datasets: the column '{self.config.image}' holds no pictures but {kind}") from None
        self._numbers = numbers
        self._pictures = encoded.select(numbers)
        self._captions = rows.select_columns([self.config.caption]).select(numbers)


def open_dataset(config: HubDatasetConfig) -> tuple[Any, Path]:
    """The split, and the folder at which its relative paths start. UserError when it is nowhere here."""
    try:
        import datasets
    except ImportError:
        raise UserError("the data source `datasets` needs the library datasets: pip install 'fewstep[data]'") from None
    try:
        return _opened(datasets, config)
    except IndexError:  # the library's answer to a saved set without rows
        raise UserError(f"datasets: '{config.path}' is empty") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"datasets: cannot open '{config.path}': {first}") from None


def _opened(datasets: Any, config: HubDatasetConfig) -> tuple[Any, Path]:
    place = Path(config.path)
    if any((place / name).is_file() for name in SAVED):
        return _split(datasets.load_from_disk(place), config), place
    if place.is_dir():
        return datasets.load_dataset(str(place), config.subset, split=config.split), place
    files = sorted(glob.glob(config.path))
    if files:
        builder = BUILDERS.get(Path(files[0]).suffix)
        if builder is None:
            raise UserError(f"datasets: '{files[0]}' is none of {', '.join(BUILDERS)}: give files of one of these")
        return datasets.load_dataset(builder, data_files={config.split: files}, split=config.split), Path(
            files[0]
        ).parent
    folder = _snapshot(config)
    return datasets.load_dataset(str(folder), config.subset, split=config.split), folder


def _split(found: Any, config: HubDatasetConfig) -> Any:
    """One split of what save_to_disk wrote, which may be a single one without a name."""
    if not isinstance(found, dict):
        return found
    if config.split not in found:
        raise UserError(f"datasets: '{config.path}' has no split '{config.split}': {nearest(config.split, found)}")
    return found[config.split]


def _snapshot(config: HubDatasetConfig) -> Path:
    """The data set's files in the hub's local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(config.path, repo_type="dataset", local_files_only=not config.download))
    except HFValidationError:
        raise UserError(f"datasets: no file or folder '{config.path}': correct `path`") from None
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        if config.download:
            raise UserError(f"datasets: cannot fetch '{config.path}': {str(error).strip().splitlines()[0]}") from None
        raise UserError(
            f"datasets: '{config.path}' is no file or folder here, and not in the local Hugging Face cache: set "
            f"`download: true`, or run `hf download --repo-type dataset {config.path}`"
        ) from None
