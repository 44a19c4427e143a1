"""Chains drawn flat: traces of backbones, and the plane of CA angles and dihedrals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .geometry import Coords, angles, dihedrals
from .secondary_structure import secondary_structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

STRUCTURE = {"h": "#c2527e", "s": "#d69a2d", "c": "#8f98a3"}  # helix, strand, neither
ALONG = "viridis"
PAGE = "#fbfaf8"
ANGLES, DIHEDRALS = (70.0, 160.0), (-180.0, 180.0)  # degrees that are shown
CELL = 1.6  # inches
FINE = 4  # pieces of a line from one CA atom to the next


def traces(chains: Sequence[Coords], columns: int = 4, by: str = "structure") -> Image.Image:
    """Chains [residues, 3] in Angstrom side by side, all on one scale, each seen along its shortest principal axis.

    by: "structure" colours helices and strands (along the chain where that is not known), "position" from end to end.
    """
    rows = -(-len(chains) // columns)
    figure = _figure(columns * CELL, rows * CELL)
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    placed = [principal(x) if np.isfinite(x).all() else np.zeros((2, 3)) for x in chains]
    half = max(float(np.abs(p[:, :2]).max()) for p in placed) + 2
    for axes in grid:
        axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
        axes.set_axis_off()
    for axes, p, x in zip(grid, placed, chains):
        _trace(axes, p, colours(x, by)) if np.isfinite(x).all() else axes.text(0, 0, "not finite", ha="center")
    figure.subplots_adjust(0, 0, 1, 1, 0, 0)
    return _picture(figure)


def _trace(axes: Axes, x: Coords, colour: Sequence[str]) -> None:
    """A smooth line from back to front, its pieces with a rim of the page's colour, so that what is in front is seen."""
    from matplotlib.collections import LineCollection

    path = smooth(x)
    order = np.argsort(path[1:, 2] + path[:-1, 2])
    pieces = np.repeat(np.stack([path[:-1, :2], path[1:, :2]], 1)[order], 2, 0)
    pieces[1::2] += 0.4 * (pieces[1::2] - pieces[1::2, ::-1])  # ink is longer than its rim, so that no seams show
    inks = [c for i in order for c in (PAGE, colour[round(i / FINE)])]
    axes.add_collection(LineCollection(list(pieces), colors=inks, linewidths=[4.5, 2.4] * len(order), capstyle="butt"))


def smooth(x: Coords, fine: int = FINE) -> Coords:
    """A Catmull-Rom curve through x [n, 3], [(n - 1) fine + 1, 3]."""
    ends = np.concatenate([x[:1], x, x[-1:]])
    a, b, c, d = (ends[k : len(x) - 1 + k, None] for k in range(4))
    t = (np.arange(fine) / fine)[:, None]
    curve = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    return np.concatenate([curve.reshape(-1, 3) / 2, x[-1:]])


def principal(x: Coords) -> Coords:
    """x turned (never mirrored) so that its widest spread lies along the first axis and its least along the third."""
    centred = x - x.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    first, second = (axis * (1 if centred[0] @ axis >= 0 else -1) for axis in axes[:2])
    return centred @ np.stack([first, second, np.cross(first, second)], 1)


def colours(x: Coords, by: str = "structure") -> list[str]:
    """A colour a residue; see `traces`."""
    letters = structure_letters(x) if by == "structure" else None
    return [STRUCTURE[letter] for letter in letters] if letters else _along(len(x))


def structure_letters(x: Coords) -> str | None:
    """h, s or c a residue; None for a chain too short, not finite, or where biotite is not installed."""
    if len(x) < 6 or not np.isfinite(x).all():
        return None
    try:
        return secondary_structure(x)
    except UserError:
        return None


def _along(n: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[ALONG](0.9 * i / max(n - 1, 1))) for i in range(n)]


def angle_plane(chains: Sequence[Coords], reference: Sequence[Coords] | None = None) -> Image.Image:
    """Where pairs of neighbouring CA angles and CA dihedrals lie, as a Ramachandran plot for chains without side atoms.

    Right-handed helices lie at (90, 50), strands at (120, -170), left-handed helices at (90, -50). Contours: half and nine
    tenths of the reference's residues.
    """
    figure = _figure(4.4, 3.4)
    axes = figure.subplots()
    density, edges = plane(chains)
    shown = np.ma.masked_equal(density, 0)
    axes.pcolormesh(edges[1], edges[0], shown, cmap="BuPu", norm="log" if shown.count() else None, rasterized=True)
    if reference is not None:
        _contours(axes, plane(reference)[0], edges)
    axes.set(xlabel="CA dihedral, degrees", ylabel="CA angle, degrees", xlim=DIHEDRALS, ylim=ANGLES)
    axes.set_xticks(range(-180, 181, 60))
    for name, place in {"helix": (50, 76), "strand": (-150, 150), "left-handed": (-50, 76)}.items():
        axes.text(*place, name, ha="center", fontsize=7, color="#6c727b")
    figure.tight_layout(pad=0.4)
    return _picture(figure)


def plane(chains: Sequence[Coords], bins: int = 48) -> tuple[Coords, tuple[Coords, Coords]]:
    """Share of residues in each cell [angles, dihedrals], and the cells' edges; chains that are not finite left out."""
    known = [x for x in chains if np.isfinite(x).all() and len(x) > 3]
    pairs = [np.stack([angles(x)[:-1], dihedrals(x)], 1) for x in known]
    both = np.concatenate(pairs) if pairs else np.zeros((0, 2))
    counts, first, second = np.histogram2d(both[:, 0], both[:, 1], bins, (ANGLES, DIHEDRALS))
    return counts / max(len(both), 1), (first, second)


def _contours(axes: Axes, density: Coords, edges: tuple[Coords, Coords]) -> None:
    middles = [(e[1:] + e[:-1]) / 2 for e in edges]
    smooth = _blurred(density)
    levels = sorted({level_of(smooth, share) for share in (0.9, 0.5)})
    axes.contour(middles[1], middles[0], smooth, levels, colors="#22252a", linewidths=0.8)


def level_of(density: Coords, share: float) -> float:
    """The density above which `share` of the whole lies."""
    ordered = np.sort(density.ravel())[::-1]
    return float(ordered[np.searchsorted(np.cumsum(ordered), share * ordered.sum())])


def _blurred(density: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights 1/4, 1/2, 1/4 along both axes; the dihedral is periodic."""
    tall = np.pad(density, ((1, 1), (0, 0)))
    tall = tall[:-2] / 4 + tall[1:-1] / 2 + tall[2:] / 4
    return np.roll(tall, 1, 1) / 4 + tall / 2 + np.roll(tall, -1, 1) / 4


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, facecolor=PAGE)


def _picture(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    written = io.BytesIO()
    FigureCanvasAgg(figure).print_png(written)
    return Image.open(written).convert("RGB")
