"""The table of data sources. A new one is a line here, or an entry point in the group `fewstep.sources`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from ..registry import Registry

if TYPE_CHECKING:
    from .source import Source

SOURCES = Registry(
    "data source",
    "fewstep.sources",
    {
        "digits": "fewstep.data.images:Digits",
        "digits_on_canvas": "fewstep.data.canvas:DigitsOnCanvas",
        "chains": "fewstep.data.chains:Chains",
        "captions": "fewstep.data.captions:Captions",
        "crops": "fewstep.data.crops:Crops",
        "datasets": "fewstep.data.hub_dataset:HubDataset",
        "fashion_mnist": "fewstep.data.images:FashionMnist",
        "image_folder": "fewstep.data.image_folder:ImageFolder",
        "labels": "fewstep.data.labels:Labels",
        "lengths": "fewstep.data.chains:Lengths",
        "prompts": "fewstep.data.prompts:Prompts",
        "text_lines": "fewstep.data.text:TextLines",
        "text_labels": "fewstep.data.text:TextLabels",
        "webdataset": "fewstep.data.webdataset:WebDataset",
    },
)


def make_source(config: Mapping[str, Any]) -> Source:
    """The source that `{source: NAME, ...}` describes; UserError names an unknown source, key or value."""
    said = dict(config)
    name = said.pop("source", None)
    if name is None:
        raise UserError(f"this data entry names no source: write `source: NAME`; {nearest('', SOURCES.names())}")
    return SOURCES.get(str(name))(**said)
