"""model_index.json: which pipeline class a folder names, of which parts it is made, and whether code comes with it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.times import TIMES

INDEX = "model_index.json"
# Parts whose copied code the installed class of a pipeline leaves alone, by that class; of all others, `times`.
BESIDE = {"FewStepProteinPipeline": ("transformer", "scheduler")}


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a folder. UserError when it is missing or no such file."""
    try:
        said = json.loads((folder / INDEX).read_text())
        said["_class_name"]
    except FileNotFoundError:
        raise UserError(f"'{folder}' is no pipeline folder: it has no {INDEX}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{folder / INDEX}' cannot be read ({error})") from error
    return said


def components(folder: Path) -> dict[str, str]:
    """Component folder -> class; empty for a folder that holds no pipeline."""
    if not (folder / INDEX).exists():
        return {}
    parts = {name: part for name, part in read_index(folder).items() if isinstance(part, list) and name[0] != "_"}
    return {name: str(part[1]) for name, part in parts.items() if len(part) == 2 and part[0] is not None}


def pipeline_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """The class that a folder names: stock, of `fewstep_pipelines`, or (when trusted) found by diffusers in the folder.

    Raises UserError for a class that is not to be had, and for code in the folder that is not trusted.
    """
    said = read_index(folder)["_class_name"]
    file, name = said if isinstance(said, list) else (None, said)
    code = foreign_code(folder)
    if code and not trust_remote_code:
        mend = "read it, then pass trust_remote_code=True"
        raise UserError(f"'{folder}' brings code ({code[0]}) that loading would run: {mend}")
    if file is not None and file not in shipped():
        name = "DiffusionPipeline"  # which looks into the folder
    found = getattr(import_module("fewstep_pipelines" if file in shipped() else "diffusers"), name, None)
    if found is None:
        raise UserError(f"'{folder}' wants {name}, which this version of diffusers does not have")
    return found


def foreign_code(folder: Path) -> list[Path]:
    """Python files in the folder other than copies of `fewstep_pipelines`, which are never run from there.

    Copies lie in the folder itself and in those of `BESIDE`; one that a component of another place names is foreign.
    """
    index = read_index(folder) if (folder / INDEX).exists() else {}
    named = index.get("_class_name")
    places = (".", *BESIDE.get(str(named[-1]) if isinstance(named, list) and named else "", (TIMES,)))
    files = {file.relative_to(folder) for file in folder.rglob("*.py")}
    copies = {file for file in files if file.stem in shipped() and file.parent.as_posix() in places}
    return sorted((files - copies) | {Path(f"{name}.py") for name in _reached(index)})


def _reached(index: dict[str, Any]) -> list[str]:
    """Names of code that model_index.json reaches for by way of other folders, as diffusers would let it."""
    parts = [part for part in index.values() if isinstance(part, list)]
    return [part[0] for part in parts if part and isinstance(part[0], str) and not set(part[0]).isdisjoint("/\\")]


def shipped() -> set[str]:
    """Names of the pipeline files in `fewstep_pipelines`."""
    package = import_module("fewstep_pipelines")
    return {file.stem for file in Path(str(package.__file__)).parent.glob("*_v*.py")}
