"""The two ways a command can fail. Both print one line; a traceback is shown with `--debug` only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: a recipe, a folder, an option. The message names what is wrong and the mend. Exit code 2."""

    exit_code = 2


class RunFailed(Exception):
    """A run that started and could not go on: NaN, guard, full disk. The message names the last good checkpoint. Exit code 1."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for error messages: `did you mean 'steps'?`, or the list of what is known when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(known)}" if known else "nothing is known here"
