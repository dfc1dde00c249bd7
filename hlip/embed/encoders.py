"""Models as `embed` runs them: ours, which see studies packed together, and others, which see one at a time.

Shapes: B studies of a batch, P embeddings of a study, E embedding, T prompts.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.clip import HLIPModel
from ..model.config import VisionConfig
from ..model.plan import TokenBatch, plan
from ..model.weights import weights_digest
from ..store.tools import cut
from ..study import Study, pack
from .baselines import SliceEncoder
from .texts import embed_prompts

MakeBatches = Callable[[Iterable[Study], int], Iterator[tuple[Any, list[Study]]]]


@dataclass(frozen=True)
class Embedder:
    """A model as a function of studies.

    module: its mode is set while studies are encoded.
    batches: studies, and the most patch tokens of a batch that is not one study, to batches with their studies. It
        runs in the processes that read studies, and so can be sent to them.
    encode: a batch to (B, P, E) or (B, E) float32; of one study also (E).
    digest: a hash of all that `encode` depends on.
    """

    module: nn.Module
    device: torch.device
    batches: MakeBatches
    encode: Callable[[Any], Tensor]
    digest: Callable[[], str]

    @classmethod
    def of(cls, model: HLIPModel | SliceEncoder, prompts: Sequence[Sequence[str]] | None = None) -> Embedder:
        """For embeddings; or with prompts, each of several sentences, for similarities to T of them: (T)."""
        if isinstance(model, HLIPModel):
            if prompts is not None:
                raise ValueError("prompts are for 2D models: compare the model's embeddings with those of texts")
            batches, hashed = functools.partial(packed, model.config.vision), functools.partial(model_digest, model)
            return cls(model.visual, model.device, batches, model.encode_image, hashed)
        encode: Callable[[Study], Tensor] = model.encode_study
        digest = model.digest
        if prompts is not None:
            encode = functools.partial(model.similarities, texts=embed_prompts(model, prompts))
            digest = hashlib.sha256(json.dumps([model.digest(), list(map(list, prompts))]).encode()).hexdigest
        return cls(model, model.device, one_by_one, encode, digest)


def packed(vision: VisionConfig, studies: Iterable[Study], max_tokens: int) -> Iterator[tuple[TokenBatch, list[Study]]]:
    """Yield planned batches for our encoder.

    Raises:
        ValueError: a study that does not suit the model.
    """
    voxels = vision.patch_size[0] * vision.patch_size[1] * vision.patch_size[2]
    for run in cut(studies, lambda study: sum(scan.numel() for scan in study.scans) // voxels, max_tokens):
        yield plan(pack(run, vision.patch_size), vision, training=False), run


def one_by_one(studies: Iterable[Study], max_tokens: int) -> Iterator[tuple[Study, list[Study]]]:
    """Yield every study as a batch of its own."""
    for study in studies:
        yield study, [study]


def model_digest(model: HLIPModel | SliceEncoder) -> str:
    """A hash of what studies are embedded by: of ours the study encoder's architecture and weights."""
    if not isinstance(model, HLIPModel):
        return model.digest()
    config = {key: value for key, value in model.config.to_dict().items() if key != "text"}
    return weights_digest(model.visual, config)
