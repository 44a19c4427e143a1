"""What a run that makes chains shows of itself while it trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from ...data.chains import shipped
from ...methods.base import DiffusionMethod
from .geometry import Coords
from .page import view
from .pictures import angle_plane, traces
from .scores import spread

ANGSTROM = 10.0  # in a nanometre
COLUMNS = 4
KNOWN = 300  # real chains whose angles are the contours


def draw_chains(method: DiffusionMethod, samples: Tensor, folder: Path, step: int) -> None:
    """Writes step-N.png (traces), angles-and-dihedrals/step-N.png and step-N.html (chains to turn) of samples.

    samples: [rows, residues, 3] in nanometres.
    """
    chains = unpadded(samples, method.preview_cond(len(samples))["mask"])
    name = f"step-{step:06d}"
    (folder / "angles-and-dihedrals").mkdir(parents=True, exist_ok=True)
    traces(chains, COLUMNS).save(folder / f"{name}.png")
    real = [c.x.astype(float) for c in spread(shipped(), KNOWN)]
    angle_plane(chains, real).save(folder / "angles-and-dihedrals" / f"{name}.png")
    (folder / f"{name}.html").write_text(view(chains, [f"{len(x)} residues" for x in chains]), encoding="utf-8")


def unpadded(samples: Tensor, mask: Tensor) -> list[Coords]:
    """Chains [residues, 3] in Angstrom of rows [rows, residues, 3] in nanometres."""
    rows, known = ANGSTROM * samples.detach().double().cpu().numpy(), mask.cpu().numpy()
    return [np.asarray(x[m]) for x, m in zip(rows, known)]
