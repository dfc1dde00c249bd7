"""The text tower: a BERT of the `transformers` library and a projection.

Shapes: N texts, W width of the BERT, E embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import BERT_BASE, TextConfig


class TextTower(nn.Module):
    """Embed texts.

    Args:
        source: folder or hub name of configuration and tokenizer; that of `config` if None.
        pretrained: read the weights there too. Else they are random, of BERT's base size if nothing of `source` is at
            hand; the tokenizer is then asked for when the first text comes.

    Raises:
        ValueError: nothing usable at `source`; names it and says why.
    """

    def __init__(self, config: TextConfig, embed_dim: int, source: Path | str | None = None, pretrained: bool = False):
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel, BertConfig
        except ImportError as error:
            raise ImportError("the text tower needs transformers: pip install 'hlip-kernels[text]'") from error

        self.config = config
        self.source = str(source or config.name)
        try:
            if pretrained:
                with _quiet():  # the pooler, which checkpoints hold and nobody uses, is reported at length
                    self.transformer = AutoModel.from_pretrained(
                        self.source, add_pooling_layer=False, dtype=torch.float32
                    )
            else:
                there = source is not None or Path(self.source).is_dir()
                bert = AutoConfig.from_pretrained(self.source) if there else BertConfig(**BERT_BASE)
                self.transformer = AutoModel.from_config(bert, add_pooling_layer=False)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(error) from error
        longest = self.transformer.config.max_position_embeddings
        if config.context_length > longest:
            raise ValueError(
                f"text tower {self.source!r} reads {longest} tokens, context_length is {config.context_length}"
            )
        self.proj = nn.Linear(self.transformer.config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        if config.locked:
            self.transformer.requires_grad_(False)

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"text tower {self.source!r}: not a readable BERT folder or hub name ({error})")

    @functools.cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.source)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(error) from error

    def train(self, mode: bool = True) -> TextTower:
        super().train(mode)
        if self.config.locked:
            self.transformer.eval()
        return self

    def features(self, texts: Sequence[str]) -> Tensor:
        """Pooled states of the BERT, before the projection: (N, W)."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.config.context_length, return_tensors="pt"
        ).to(self.proj.weight.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.locked):
            hidden = self.transformer(**tokens).last_hidden_state
        if self.config.pooling == "cls":
            return hidden[:, 0]
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """(N, E), not normalised."""
        return self.proj(self.features(texts))


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
