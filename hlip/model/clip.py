"""The two towers.

Shapes: B studies (of one process), E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..study import PackedBatch
from .config import ModelConfig, preset
from .encoder import StudyEncoder
from .losses import Outputs, at_least_float32
from .plan import TokenBatch
from .text import Source, TextTower


class VisualHead(nn.Module):
    """The projection of the encoder's outputs to the embedding: (B, P, F) to (B, P, E)."""

    def __init__(self, features: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(features, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=features**-0.5)

    def forward(self, outputs: Tensor) -> Tensor:
        return self.proj(outputs)


class VisualTower(nn.Module):
    """Encoder and projection. Returns (B, P, E) or, unless `config.per_prefix`, (B, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.per_prefix = config.per_prefix
        self.trunk = StudyEncoder(config.vision)
        self.head = VisualHead(config.vision.num_features, config.embed_dim) if config.projection else nn.Identity()

    def forward(self, batch: PackedBatch | TokenBatch) -> Tensor:
        outputs = self.trunk(batch)
        return self.head(outputs if self.per_prefix else outputs[:, 0])


class HLIPModel(nn.Module):
    """Study encoder and text tower with a shared embedding.

    Args:
        text_source, pretrained_text: see `TextTower`.
    """

    def __init__(self, config: ModelConfig, text_source: Source | None = None, pretrained_text: bool = False) -> None:
        super().__init__()
        self.config = config
        self.visual = VisualTower(config)
        self.text = TextTower(config.text, config.embed_dim, text_source, pretrained_text)
        siglip = config.objective == "siglip"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if siglip else 1 / 0.07)))
        if config.objective != "clip":
            # The published key has two meanings: SigLIP's bias, or the logarithm of the reports' inverse temperature.
            self.logit_bias = nn.Parameter(torch.tensor(-10.0 if siglip else math.log(1 / 0.07)))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def encode_image(self, batch: PackedBatch | TokenBatch) -> Tensor:
        """Embeddings of the batch's studies, of unit length: (B, E), or (B, P, E) if `config.per_prefix`."""
        if not isinstance(batch, (PackedBatch, TokenBatch)):
            raise ValueError(f"expected a batch of hlip.pack([study, ...], patch_size), got {type(batch).__name__}")
        return F.normalize(at_least_float32(self.visual(batch.to(self.device))), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts: (N, E), of unit length; of one text (1, E)."""
        return F.normalize(at_least_float32(self.text(texts)), dim=-1)

    def forward(self, batch: PackedBatch | TokenBatch, texts: Sequence[str] | Tensor) -> Outputs:
        """What `contrastive_loss` reads. Of several image embeddings of a study, those that the objective compares.

        Args:
            texts: of the batch's studies, as `ModelConfig.texts` gives them; or their (N, W) `TextTower.features`.
        """
        pairs = 2 if self.config.objective == "dual" else 1
        image = self.encode_image(batch)
        image = image[:, :pairs] if self.config.per_prefix else image[:, None]
        text = self.text.proj(texts) if isinstance(texts, Tensor) else self.text(texts)
        text = F.normalize(at_least_float32(text), dim=-1)
        text = text.unflatten(0, (pairs, len(image))).transpose(0, 1)
        scale = self.logit_scale[None]
        if self.config.objective == "dual":
            scale = torch.stack([self.logit_scale, self.logit_bias])
        bias = self.logit_bias.clone() if self.config.objective == "siglip" else None
        return Outputs(image, text, scale.exp(), bias)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep temperatures from 0.01 to 1, as CLIP does; call after every step. SigLIP's bias is left alone."""
        self.logit_scale.clamp_(0, math.log(100))
        if self.config.objective == "dual":
            self.logit_bias.clamp_(0, math.log(100))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model, its configuration and its tokenizer to `folder`."""
        from .checkpoint import save_pretrained

        save_pretrained(self, Path(folder))

    def save_open_clip(self, folder: Path | str, name: str | None = None) -> None:
        """Write the model to `folder` in the layout of the released models, for open_clip with HLIP's released code.

        Args:
            name: of the released model that this is; found by its architecture if None.

        Raises:
            ValueError: it has the architecture of no released model, or `folder` holds something else.
        """
        from .checkpoint import save_open_clip

        save_open_clip(self, Path(folder), name)

    def push_to_hub(self, repo_id: str, layout: Literal["hlip", "open_clip"] = "hlip", private: bool = False) -> None:
        """Upload what `save_pretrained` or `save_open_clip` writes to the Hugging Face hub.

        Raises:
            ValueError: the hub refuses; says why.
        """
        from .checkpoint import push_to_hub

        push_to_hub(self, repo_id, layout, private)

    @classmethod
    def from_pretrained(cls, name: Path | str, model: str | None = None, text: Path | str | None = None) -> HLIPModel:
        """Read a model, in evaluation mode: what `save_pretrained` wrote, a released one, or a training checkpoint.

        Every weight must be used and be finite; a released model's `logit_bias` may be absent.

        Args:
            name: a file of weights, a folder, or a name on the Hugging Face hub.
            model: which of `hlip.list_models()` it is, where neither files beside the weights nor shapes can say.
            text: folder or hub name of the text tower's configuration and tokenizer, in place of the model's own.

        Raises:
            ValueError: nothing usable there; names the file and the reason.
        """
        from .checkpoint import from_pretrained

        return from_pretrained(str(name), model, text)


def create_model(
    name: str,
    pretrained_text: bool | Path | str | None = False,
    pretrained_vision: Path | str | None = None,
    **changes: Any,
) -> HLIPModel:
    """A new model by name. Without pretrained parts it needs no network: all weights are drawn from the default
    generator, position tables are the published ones.

    Args:
        name: see `hlip.list_models()`.
        pretrained_text: True reads the text tower's weights from where its configuration says; a folder or hub name
            reads another BERT.
        pretrained_vision: a 2D ViT of MAE or timm, as a file, folder or hub name ("timm/vit_base_patch16_224.mae"),
            for the encoder to begin with. See `hlip.model.inflate.load_vision`.
        changes: fields of `ModelConfig` to replace.

    Raises:
        ValueError: unknown name, or a part that cannot be read.
    """
    config = replace(preset(name), **changes)
    if isinstance(pretrained_text, (str, Path)):
        config = replace(config, text=replace(config.text, name=str(pretrained_text)))
    model = HLIPModel(config, pretrained_text=bool(pretrained_text))
    if pretrained_vision is not None:
        from .inflate import load_vision

        load_vision(model.visual.trunk, pretrained_vision)
    return model
