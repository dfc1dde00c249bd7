"""Zero-shot classification of held-out studies while a run goes on."""

from __future__ import annotations

import logging

import numpy as np

from ..evaluate.evaluation import zeroshot
from ..evaluate.labels import MISSING, read_labels
from ..evaluate.metrics import macro_auc, scorable
from ..evaluate.tasks import Task, load_task
from ..model.clip import HLIPModel
from ..model.config import ModelConfig
from ..processes import Processes
from ..store.store import Store
from .config import TrainConfig
from .step import gathered


class HeldOut:
    """Studies to evaluate on, with their labels and prompts.

    scored: the classes that the AUC is averaged over: those that studies have and others lack; of a task of one class
        a study, all.
    """

    def __init__(self, store: Store, labels: np.ndarray, task: Task) -> None:
        self.store, self.labels, self.task = store, labels, task
        self.scored = scorable(labels)
        if task.kind == "multi-class" or not self.scored.any():
            self.scored[:] = True

    @classmethod
    def read(cls, config: TrainConfig, model: ModelConfig) -> HeldOut | None:
        """None if the run does not evaluate.

        Raises:
            ValueError: what there is allows no AUC; names the file.
        """
        if config.val is None or config.prompts is None:
            return None
        task, store = load_task(config.prompts), Store(config.val)
        store.check_finished()
        if task.unit == "scan" and len(store.shapes) > len(store):
            raise ValueError(
                f"prompts {config.prompts}: a task of scans; studies in {config.val} have several: give a store with "
                "one scan a study, or leave it to hlip eval"
            )
        store.scan_tokens(model.vision.patch_size)  # or an error before training, not after
        source = config.labels or config.val
        table = read_labels(config.labels or store, task.label_columns, task.study)
        unknown = [uid for uid in store.uids if uid not in table or (table[uid] == MISSING).all()]
        if unknown:
            raise ValueError(f"{source}: no label for study {unknown[0]} ({len(unknown)} of {len(store)} lack one)")
        held_out = cls(store, np.stack([table[uid] for uid in store.uids]), task)
        try:
            held_out.macro_auc(np.zeros(held_out.labels.shape))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if lacking := [name for name, scored in zip(task.names, held_out.scored, strict=True) if not scored]:
            logging.warning("%s: left out of the AUC, without positives or negatives: %s", source, ", ".join(lacking))
        return held_out

    def macro_auc(self, scores: np.ndarray) -> float:
        return macro_auc(self.labels[:, self.scored], scores[:, self.scored])

    def auc(self, model: HLIPModel, world: Processes) -> float:
        """Macro AUC of zero-shot classification; every process embeds its share."""
        mine = range(world.rank, len(self.store), world.size)
        with gathered(model):
            scores = zeroshot(model, map(self.store.study, mine), self.task)[1] if mine else None
        shares = np.empty(self.labels.shape)
        for rank, rows in enumerate(world.gather(scores)):
            if rows is not None:
                shares[rank :: world.size] = rows
        return self.macro_auc(shares)
