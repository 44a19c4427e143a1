"""What is wrong with a model folder, and the mend. Nothing in the folder is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..models.folder import CARD
from .card import FORMAT
from .checks_files import FILE_CHECKS
from .checks_sampling import SAMPLING_CHECKS
from .finding import Finding, Subject


def doctor(folder: str | Path) -> list[Finding]:
    """Findings about a model folder, in the order of the checks; after an error in the files nothing is loaded.

    Raises UserError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no model folder '{folder}'")
    found, said = _card(folder)
    for checks in (FILE_CHECKS, SAMPLING_CHECKS):
        if any(finding.level == "error" for finding in found):
            return found
        found += [finding for check in checks for finding in check(Subject(folder, said))]
    return found


def _card(folder: Path) -> tuple[list[Finding], dict[str, Any]]:
    file = folder / CARD
    if not file.exists():
        return [
            Finding("warn", f"no {CARD}: steps, guidance and noise levels are unknown", "export it with fewstep")
        ], {}
    try:
        said = json.loads(file.read_text())
        format_, family = said["format"], said["family"]
    except (ValueError, KeyError, TypeError) as error:
        return [Finding("error", f"{CARD} cannot be read ({error})", "export the model again")], {}
    if format_ > FORMAT:
        return [Finding("error", f"{CARD} has format {format_}, this fewstep knows {FORMAT}", "update fewstep")], said
    return [Finding("ok", f"{CARD}: family {family}, method {said.get('method', 'unknown')}")], said
