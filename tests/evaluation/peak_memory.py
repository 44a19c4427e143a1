"""Peak resident memory of a piece of code in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

STATUS = Path("/proc/self/status")
needs_proc = pytest.mark.skipif(not STATUS.exists(), reason=f"peak memory is read from {STATUS}")
# not getrusage, whose peak a process takes over from the one that starts it
PEAK = f"import re; peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('{STATUS}').read())[1]) / 1024"


def peak_megabytes(before: str, code: str) -> float:
    """What `code` adds to the peak that is there after `before`, both statements of Python."""
    script = "\n".join([PEAK, before, "held = peak()", code, "print(peak() - held)"])
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
