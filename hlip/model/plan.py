"""Decisions made on the host before the encoder runs: dropout, and the position of every token.

Shapes: T patch tokens, V voxels of a patch, K rows of the position tables that make up one position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hlip_kernels import StudyLayout

from ..study import Draws, PackedBatch, patch_dropout, scan_dropout
from .config import VisionConfig
from .positions import POSITIONS, Rope, coordinates, sequential_rows, spatial_rows


@dataclass
class TokenBatch:
    """The encoder's input for a packed batch: tensors and a layout, nothing left to decide.

    patches: (T, V) uint8
    places: (T, K) int32 - a token's position is the sum of these rows of the position tables, spatial rows before
        sequential ones.
    weights: (T, K) float32 - factors of those rows.
    layout: with the prefix rows of the model.
    coordinates: (T, 3) int32 - a token's place along d, h and w of its scan, where positions turn queries and keys.
    """

    patches: Tensor
    places: Tensor
    weights: Tensor
    layout: StudyLayout
    coordinates: Tensor | None = None

    def pin_memory(self) -> TokenBatch:
        return replace(
            self,
            patches=self.patches.pin_memory(),
            places=self.places.pin_memory(),
            weights=self.weights.pin_memory(),
            layout=self.layout.pin_memory(),
            coordinates=None if self.coordinates is None else self.coordinates.pin_memory(),
        )

    def to(self, device: torch.device | str) -> TokenBatch:
        return replace(
            self,
            patches=self.patches.to(device, non_blocking=True),
            places=self.places.to(device, non_blocking=True),
            weights=self.weights.to(device, non_blocking=True),
            layout=self.layout.to(device),
            coordinates=None if self.coordinates is None else self.coordinates.to(device, non_blocking=True),
        )


def plan(
    batch: PackedBatch,
    config: VisionConfig,
    training: bool,
    seeds: Sequence[int] | None = None,
    positions_seed: int | None = None,
) -> TokenBatch:
    """Plan a batch for an encoder of this configuration.

    Args:
        seeds: of what is drawn in training, one per study; see `Draws`.
        positions_seed: of the positions of scans, which all studies then draw alike.

    Scans beyond `config.max_scans`, and grids other than `config.grid`, take interpolated positions.

    Raises:
        ValueError: patches of another size.

    Source: HLIP (arXiv 2505.21862), sections 3.1 and 3.2.
    """
    if tuple(batch.patch_size) != tuple(config.patch_size):
        raise ValueError(f"the model reads patches of {config.patch_size} voxels, the batch has {batch.patch_size}")
    draws = Draws(seeds)
    if training and config.scan_dropout:
        batch = batch.select(scan_dropout(batch.layout, config.scan_dropout, draws))
    if training and config.patch_dropout:
        batch = batch.select(patch_dropout(batch.layout, config.patch_dropout, config.levels[0], draws))
    layout = batch.layout
    try:
        scan, place = batch.positions.numpy().T
    except RuntimeError as error:
        raise RuntimeError(
            "a batch is planned on the host, before a transform of torch.func: give the model encoder.plan(batch)"
        ) from error
    columns = [spatial_rows(place, layout, config.grid)]
    if config.max_scans:
        if positions_seed is not None:
            draws = Draws([positions_seed] * len(batch))
        numbers, factors = sequential_rows(scan, layout, config.max_scans, draws if training else None)
        columns.append((numbers + int(np.prod(config.grid)), factors))
    places = torch.from_numpy(np.concatenate([rows for rows, _ in columns], axis=1).astype(np.int32))
    weights = torch.from_numpy(np.concatenate([factors for _, factors in columns], axis=1).astype(np.float32))
    turns = isinstance(POSITIONS[config.positions], Rope)
    turned = torch.from_numpy(coordinates(place, layout).astype(np.int32)) if turns else None
    tokens = TokenBatch(batch.patches, places, weights, layout.with_num_prefix(config.num_prefix).build(), turned)
    return tokens.to(batch.patches.device)
