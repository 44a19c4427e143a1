"""Writes configs/MATRIX.md: python -m tests.matrix"""

from .table import FILE, page

FILE.write_text(page())
