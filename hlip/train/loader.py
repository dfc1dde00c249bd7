"""Micro-batches from a store, made whole in the data-loader's workers: read, packed, planned, texts chosen."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..model.clip import HLIPModel
from ..model.config import ModelConfig
from ..model.memory import release_memory
from ..model.plan import plan
from ..objective import OBJECTIVES, WHOLE, Wording
from ..processes import Processes
from ..store.store import Store
from ..study import pack
from ..terminal import guard_streams
from .config import TrainConfig
from .sampler import Item, StepSampler
from .step import MicroBatch

Features = Callable[[Sequence[str]], Tensor]  # of texts: (N, W), see `TextTower.features`


class MicroBatches(Dataset):
    """The micro-batches that `StepSampler` plans; what is drawn for one follows from its items' seeds alone.

    Args:
        same_positions: draw the positions of scans once for all studies of a micro-batch.
    """

    def __init__(
        self, store: Store, model: ModelConfig, wording: Wording = WHOLE, same_positions: bool = False
    ) -> None:
        self.store, self.model, self.wording, self.same_positions = store, model, wording, same_positions

    def __getitem__(self, items: Sequence[Item]) -> MicroBatch:
        """Raises ScanError where the store is damaged; names the file."""
        studies = [self.store.study(item.study, item.scans) for item in items]
        batch = pack(studies, self.model.vision.patch_size)
        seed = int(np.random.SeedSequence([item.seed for item in items]).generate_state(1, np.uint64)[0]) >> 1
        positions_seed = seed if self.same_positions else None
        tokens = plan(batch, self.model.vision, True, [item.seed for item in items], positions_seed)
        objective = OBJECTIVES[self.model.objective]
        drawn = [
            objective.draw_text((study.impression, study.findings), self.wording, np.random.default_rng([item.seed, 1]))
            for study, item in zip(studies, items, strict=True)
        ]
        impressions, findings = zip(*drawn, strict=True)
        return MicroBatch(tokens, objective.texts(impressions, findings, self.wording), batch.uids, seed)


def read_batches(
    config: TrainConfig, store: Store, model: ModelConfig, sampler: StepSampler, device: torch.device,
    features: Features | None,
) -> Iterator[MicroBatch]:  # fmt: skip
    """The micro-batches of a rank's steps, read ahead; their texts as `features`, if there are any."""
    loader = DataLoader(
        MicroBatches(store, model, config.wording, config.scan_positions == "batch"),
        batch_size=None,
        sampler=sampler,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
        worker_init_fn=outlive_sigterm,
    )
    for piece in loader:
        yield replace(piece, texts=features(piece.texts)) if features is not None else piece


def outlive_sigterm(worker: int) -> None:
    """Clusters send SIGTERM to all processes, those that read data too, which are needed until the step is done.
    A second one ends them."""
    guard_streams()  # which a new interpreter does not inherit
    release_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def locked_features(model: HLIPModel, store: Store, world: Processes, wording: Wording = WHOLE) -> Features:
    """States of a fixed text tower for every report of the store, each read once: texts to (N, W).

    Reports are read in the same chunks whatever the number of processes, so that the states are the same bits.
    """
    model.eval()  # no dropout; a step sets what it needs
    impressions, findings = (store.manifest.column(name).to_pylist() for name in ("impression", "findings"))
    unique = sorted(set(model.objective.texts(impressions, findings, wording)))
    chunks = [unique[i : i + 64] for i in range(0, len(unique), 64)]
    mine = tqdm(chunks[world.rank :: world.size], "reading reports", unit="chunk", disable=not world.first)
    with torch.no_grad():
        parts = world.gather([model.text.features(chunk).float().cpu().numpy() for chunk in mine])
    table = torch.from_numpy(np.concatenate([parts[i % world.size][i // world.size] for i in range(len(chunks))]))
    rows = {text: i for i, text in enumerate(unique)}
    return lambda texts: table[[rows[text] for text in texts]]
