"""Zero-shot classification of held-out studies while a run goes on."""

from __future__ import annotations

import numpy as np
import torch

from ..evaluate.labels import read_labels
from ..evaluate.metrics import macro_auc
from ..evaluate.zeroshot import Prompts, zeroshot
from ..model.clip import HLIPModel
from ..model.config import ModelConfig
from ..processes import Processes
from ..store.store import Store, StudyDataset
from .config import TrainConfig
from .step import gathered


class HeldOut:
    """Studies to evaluate on, with their labels and prompts."""

    def __init__(self, dataset: StudyDataset, labels: np.ndarray, prompts: Prompts) -> None:
        self.dataset, self.labels, self.prompts = dataset, labels, prompts

    @classmethod
    def read(cls, config: TrainConfig, model: ModelConfig) -> HeldOut | None:
        """None if the run does not evaluate.

        Raises:
            ValueError: what there is allows no AUC; names the file.
        """
        if config.val is None or config.prompts is None:
            return None
        prompts, store = Prompts.read(config.prompts), Store(config.val)
        store.check_finished()
        store.scan_tokens(model.vision.patch_size)  # or an error before training, not after
        names = list(prompts.classes)
        if config.labels is not None:
            source, table = config.labels, read_labels(config.labels, names)
            unknown = [uid for uid in store.uids if uid not in table]
            labels = np.stack([table[uid] for uid in store.uids]) if not unknown else np.empty(0)
        else:
            source, (known, values) = config.val, store.labels
            missing = [name for name in names if name not in known]
            if missing:
                raise ValueError(f"{source}: the store has no labels for {', '.join(missing)}: give --labels")
            labels = values[:, [known.index(name) for name in names]]
            unknown = store.uids[~np.isin(labels, (0, 1)).all(1)].tolist()
        if unknown:
            raise ValueError(f"{source}: no label for study {unknown[0]} ({len(unknown)} of {len(store)} lack one)")
        try:
            macro_auc(labels, np.zeros(labels.shape))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return cls(StudyDataset(store), labels, prompts)

    def auc(self, model: HLIPModel, world: Processes) -> float:
        """Macro AUC of zero-shot classification; every process embeds its share."""
        mine = range(world.rank, len(self.dataset), world.size)
        with gathered(model), torch.no_grad():
            scores = zeroshot(model, (self.dataset[i] for i in mine), self.prompts)[1].numpy() if mine else None
        shares = np.empty(self.labels.shape, dtype=np.float32)
        for rank, share in enumerate(world.gather(scores)):
            if share is not None:
                shares[rank :: world.size] = share
        return macro_auc(self.labels, shares)
