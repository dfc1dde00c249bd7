"""Embeddings of texts: of prompts, and of reports.

Shapes: n texts, K prompts, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.clip import HLIPModel
from ..read.safe import as_texts
from .baselines import SliceEncoder

Progress = Callable[[Sequence[Any]], Iterable[Any]]
TextEncoder = HLIPModel | SliceEncoder


def check_lengths(model: TextEncoder, texts: Sequence[str]) -> None:
    """Raises ValueError where a text is longer than what the model's text tower reads; names it and the counts."""
    texts = as_texts(texts, least=0)
    if isinstance(model, SliceEncoder):
        counts, most = model.count_tokens(texts)
    elif isinstance(model, HLIPModel):
        cleaned = model.text.cleaned(texts) if texts else []
        counts = [len(tokens) for tokens in model.text.tokenizer(cleaned, verbose=False)["input_ids"]] if texts else []
        most = model.config.text.context_length
    else:
        return
    for text, count in zip(texts, counts, strict=True):
        if count > most:
            raise ValueError(f"prompt {text!r} has {count} tokens, the model's text tower reads {most}")


@torch.no_grad()
def embed_prompts(model: TextEncoder, prompts: Iterable[Sequence[str]]) -> Tensor:
    """(K, E): of every prompt the normalised mean over the embeddings of its sentences.

    Raises:
        ValueError: no prompt, or a sentence that is too long for the text tower.
    """
    rows = []
    for sentences in [prompts] if isinstance(prompts, str) else prompts:
        check_lengths(model, sentences)
        rows.append(F.normalize(model.encode_text(sentences).mean(0), dim=0))
    if not rows:
        raise ValueError("there is no prompt")
    return torch.stack(rows)


@torch.no_grad()
def embed_texts(model: TextEncoder, texts: Sequence[str], batch: int = 64, progress: Progress = iter) -> Tensor:
    """(n, E) float32 of unit length, on the host. Equal texts are embedded once, and so are equal to the last bit."""
    texts = as_texts(texts)
    # Texts of about one length lie in a batch, so that little of it is padding.
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    starts = range(0, len(distinct), batch)
    parts = [model.encode_text(distinct[start : start + batch]).float().cpu() for start in progress(starts)]
    place = {text: i for i, text in enumerate(distinct)}
    return torch.cat(parts)[[place[text] for text in texts]]
