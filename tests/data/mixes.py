"""Image sizes like those of COCO."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COMMON = {(480, 640): 0.45, (640, 480): 0.15, (427, 640): 0.20, (640, 427): 0.06, (640, 640): 0.02, (375, 500): 0.04}


def coco_like(count: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Heights and widths [count]: the sizes of COMMON with their shares, the other 8 % have sides of 240 to 640."""
    rng = np.random.default_rng(seed)
    shares = [*COMMON.values(), 1 - sum(COMMON.values())]
    sides = rng.integers(240, 641, (count, 2))
    pick = rng.choice(len(shares), count, p=shares)
    for number, size in enumerate(COMMON):
        sides[pick == number] = size
    return sides[:, 0], sides[:, 1]
