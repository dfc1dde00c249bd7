"""Embeddings of many studies, batched by tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..data.batch import Study, pack
from ..model.clip import HLIPModel


@torch.no_grad()
def embed_studies(model: HLIPModel, studies: Iterable[Study], max_tokens: int = 8192) -> Iterator[tuple[str, Tensor]]:
    """Yield each study's uid and its (E) float32 embedding of unit length, on the host, in order.

    Args:
        max_tokens: studies are packed together up to this many patch tokens; a larger study runs alone.
    """
    training = model.training
    model.eval()
    waiting: list[Study] = []
    tokens = 0
    try:
        for study in studies:
            size = sum(scan.numel() for scan in study.scans) // model.visual.trunk.patch_embed.proj.weight[0].numel()
            if waiting and tokens + size > max_tokens:
                yield from _embed(model, waiting)
                waiting, tokens = [], 0
            waiting.append(study)
            tokens += size
        if waiting:
            yield from _embed(model, waiting)
    finally:
        model.train(training)


def _embed(model: HLIPModel, studies: list[Study]) -> Iterator[tuple[str, Tensor]]:
    batch = pack(studies, model.config.vision.patch_size)
    embeddings = model.encode_image(batch)
    if model.config.per_prefix:  # the first is for zero-shot classification
        embeddings = embeddings[:, 0]
    return zip(batch.uids, embeddings.float().cpu(), strict=True)
