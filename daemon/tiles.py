"""Tiles, for machines whose memory does not hold a whole bucket: slower, and not exactly the same.

A cell of the network's output depends on most of the head, so a tile sees less than the whole does. The difference is
reported at start on the golden case, and refused above the golden case's own tolerance.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from daemon.engines import OUTPUTS, Bucket, Engine
from daemon.words import ARTEFACTS, Array

HALO_CELLS = 16
"""Cells of context on the cut side of a tile."""

ALIGNMENT = 16
"""Tiles start on multiples of this, so that max-pooling (four halvings) falls on the same cells as in the whole."""

CUTS: tuple[tuple[int, ...], ...] = ((1,), (1, 2), (0, 1, 2))
"""Axes that are halved, in order of falling memory: the longest first."""


class TiledEngine:
    """An engine that runs every image as overlapping tiles of another engine."""

    def __init__(self, engine: Engine, axes: tuple[int, ...]) -> None:
        """Wrap an engine; `axes` are halved."""
        self._engine, self.axes = engine, axes
        self.facts = replace(engine.facts, tiles=2 ** len(axes))
        self.notes = engine.notes
        self._out: dict[Bucket, dict[str, Array]] = {}

    def load(self, bucket: Bucket) -> None:
        """Load the tile's shape, and keep buffers for the whole maps."""
        self._engine.load(tile_shape(bucket, self.axes))
        channels = {name: len(ARTEFACTS) if name == "artefact_variance" else 1 for name in OUTPUTS}
        self._out[bucket] = {name: np.zeros((n, *bucket), dtype=np.float32) for name, n in channels.items()}

    def run(self, image: Array) -> dict[str, Array]:
        """See `Engine.run`."""
        bucket = (image.shape[0], image.shape[1], image.shape[2])
        out = self._out[bucket]
        cuts = [axis_cuts(n) if axis in self.axes else [(0, 0, n)] for axis, n in enumerate(bucket)]
        shape = tile_shape(bucket, self.axes)
        for parts in product(*cuts):
            seen = tuple(slice(start, start + n) for (start, _, _), n in zip(parts, shape, strict=True))
            kept = tuple(slice(low, high) for _, low, high in parts)
            inside = tuple(slice(low - start, high - start) for start, low, high in parts)
            maps = self._engine.run(np.ascontiguousarray(image[seen]))
            for name in OUTPUTS:
                out[name][(slice(None), *kept)] = maps[name][(slice(None), *inside)]
        return out

    def reduce(self, image: Array, masks: NDArray[np.float32], affected_variance: float) -> dict[str, Array] | None:
        """Not offered: a grey-matter region crosses tiles."""
        del image, masks, affected_variance
        return None


def tile_shape(bucket: Bucket, axes: tuple[int, ...]) -> Bucket:
    """Shape of the tiles of a bucket whose `axes` are halved."""
    shape = [bucket[axis] - axis_cuts(bucket[axis])[-1][0] if axis in axes else bucket[axis] for axis in range(3)]
    return (shape[0], shape[1], shape[2])


def axis_cuts(length: int) -> list[tuple[int, int, int]]:
    """Two tiles along one axis: (start of the tile, first cell kept, end of the cells kept).

    Both have the same length, start on multiples of `ALIGNMENT`, and see at least `HALO_CELLS` beyond the cut.
    """
    half = length // 2
    tile = -(-(half + HALO_CELLS) // ALIGNMENT) * ALIGNMENT
    return [(0, 0, half), (max(length - tile, 0), half, length)]
