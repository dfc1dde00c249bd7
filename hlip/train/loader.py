"""Micro-batches from a store, made whole in the data-loader's workers: read, packed, planned, texts chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from ..model.config import ModelConfig
from ..model.plan import plan
from ..prepare.reports import split_sentences
from ..store.store import Store
from ..study import pack
from .config import Texts
from .sampler import Item
from .step import MicroBatch


class MicroBatches(Dataset):
    """The micro-batches that `StepSampler` plans; what is drawn for one follows from its items' seeds alone.

    Args:
        texts, sentence_dropout: see `TrainConfig`.
    """

    def __init__(
        self, store: Store, model: ModelConfig, texts: Texts = "report", sentence_dropout: float = 0.0
    ) -> None:
        self.store, self.model, self.texts, self.sentence_dropout = store, model, texts, sentence_dropout

    def __getitem__(self, items: Sequence[Item]) -> MicroBatch:
        """Raises ScanError where the store is damaged; names the file."""
        studies = [self.store.study(item.study, item.scans) for item in items]
        batch = pack(studies, self.model.vision.patch_size)
        seed = int(np.random.SeedSequence([item.seed for item in items]).generate_state(1, np.uint64)[0]) >> 1
        tokens = plan(batch, self.model.vision, training=True, seeds=[item.seed for item in items])
        dual = self.model.objective == "dual"
        impressions, findings = [], []
        for study, item in zip(studies, items, strict=True):
            random = np.random.default_rng([item.seed, 1])
            parts = draw_text((study.impression, study.findings), self.texts, self.sentence_dropout, dual, random)
            impressions.append(parts[0])
            findings.append(parts[1])
        return MicroBatch(tokens, self.model.texts(impressions, findings), batch.uids, seed)


def draw_text(
    report: tuple[str, str], texts: Texts, dropout: float, dual: bool, random: np.random.Generator
) -> tuple[str, str]:
    """An impression and findings, as a step reads them.

    dual: the impression alone is varied; an absent one is made of the findings' sentences.
    """
    if texts == "report" and dropout == 0:
        return report
    impression, findings = report
    sentences = split_sentences(impression)
    if dual:
        sentences = sentences or split_sentences(findings)
    else:
        sentences, findings = sentences + split_sentences(findings), ""
    if not sentences:
        return report
    keep = random.random(len(sentences)) >= dropout
    keep[random.integers(len(sentences))] = True
    sentences = [sentence for sentence, kept in zip(sentences, keep, strict=True) if kept]
    if texts == "shuffled":
        random.shuffle(sentences)
    elif texts == "sentence":
        sentences = [sentences[int(random.integers(len(sentences)))]]
    return " ".join(sentences), findings
