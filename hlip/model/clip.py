"""Two towers and the contrastive loss.

Shapes: B studies (of one process), E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import PackedBatch
from .config import ModelConfig, preset
from .plan import TokenBatch
from .text import TextTower
from .vit import StudyEncoder


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

    def __init__(
        self, config: ModelConfig, text_source: Path | str | None = None, pretrained_text: bool = False
    ) -> None:
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
        return F.normalize(self.visual(batch.to(self.device)).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts: (N, E), of unit length."""
        return F.normalize(self.text(texts).float(), dim=-1)

    def forward(self, batch: PackedBatch, text_features: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Image and text embeddings of a batch, each (B, E), and the temperature's inverse. Of several image
        embeddings of a study, the first.

        Args:
            text_features: (B, W) from `TextTower.features`, where they are known; else the reports are read.
        """
        image = self.encode_image(batch)
        if self.config.per_prefix:
            image = image[:, 0]
        if text_features is None:
            text_features = self.text.features(batch.reports)
        text = F.normalize(self.text.proj(text_features).float(), dim=-1)
        return image, text, self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature at 0.01 or above, as CLIP does; call after every step."""
        self.logit_scale.clamp_(0, math.log(100))

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
    name: str, pretrained_text: bool | Path | str = False, pretrained_vision: Path | str | None = None, **changes: Any
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
    if not isinstance(pretrained_text, bool):
        config = replace(config, text=replace(config.text, name=str(pretrained_text)))
    model = HLIPModel(config, pretrained_text=bool(pretrained_text))
    if pretrained_vision is not None:
        from .inflate import load_vision

        load_vision(model.visual.trunk, pretrained_vision)
    return model


class _AllGather(torch.autograd.Function):
    """Rows of all processes. Every process must compute the same function of them.

    Then the gradient of that function reaches each process's own rows at full size; the factor makes up for
    DistributedDataParallel, which averages parameter gradients over the processes.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric contrastive loss over the studies of all processes.

    Args:
        image, text: (B, E) of unit length; B is the same on every process.
        logit_scale: the temperature's inverse.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        image, text = _AllGather.apply(image), _AllGather.apply(text)
    logits = logit_scale * image @ text.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
