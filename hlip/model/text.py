"""The text tower: a BERT of the `transformers` library and a projection.

Shapes: N texts, W width of the BERT, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import TextConfig


class TextTower(nn.Module):
    """Embed texts.

    Args:
        source: where configuration and tokenizer are read from; a folder or a name on the hub.
        pretrained: read the weights there too; otherwise they are random, to be loaded later.

    Raises:
        ValueError: nothing usable at `source`; names it and says why.
    """

    def __init__(self, config: TextConfig, embed_dim: int, source: Path | str | None = None, pretrained: bool = True):
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModel, AutoTokenizer
        except ImportError as error:
            raise ImportError("the text tower needs transformers: pip install 'hlip-kernels[text]'") from error

        self.config = config
        name = str(source or config.name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            if pretrained:
                with _quiet():  # the pooler, which checkpoints hold and nobody uses, is reported at length
                    self.transformer = AutoModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32)
            else:
                self.transformer = AutoModel.from_config(AutoConfig.from_pretrained(name), add_pooling_layer=False)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"text tower {name!r}: not a readable BERT folder or hub name ({error})") from error
        longest = self.transformer.config.max_position_embeddings
        if config.context_length > longest:
            raise ValueError(f"text tower {name!r} reads {longest} tokens, context_length is {config.context_length}")
        self.proj = nn.Linear(self.transformer.config.hidden_size, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=self.proj.in_features**-0.5)
        if config.locked:
            self.transformer.requires_grad_(False)

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
