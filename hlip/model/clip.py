"""The two towers, and how they begin: new, or with the weights of a 2D vision transformer.

Shapes: B studies (of one process), E embedding, C width, (h, w) patches of an image, (d, h, w) those of a scan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hlip_kernels import Grid

from ..objective import OBJECTIVES, Outputs, at_least_float32
from ..study import PackedBatch
from .checkpoint import Saved
from .config import ModelConfig, preset
from .encoder import StudyEncoder
from .plan import TokenBatch
from .positions import sincos
from .text import TextTower
from .tokenizer import Source
from .weights import find_weights, load_strict, local_folder, read_weights, shorten

log = logging.getLogger(__name__)

# Left aside: the classifier of a timm ViT and what comes right before it, and the decoder of a whole MAE.
ASIDE = ("head.", "fc_norm.", "decoder", "mask_token")
# What a 2D transformer has not; these stay as they are.
OWN = ("reg_token", "sequential_posemb", "attn_pool.", "weighted_average.")


class VisualTower(nn.Module):
    """Encoder and projection, if the model has one. Returns (B, P, E) or, unless `config.per_prefix`, (B, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.per_prefix = config.per_prefix
        self.trunk = StudyEncoder(config.vision)
        self.head = nn.Sequential()
        if config.projection:
            self.head.proj = nn.Linear(config.vision.num_features, config.embed_dim, bias=False)
            nn.init.normal_(self.head.proj.weight, std=config.vision.num_features**-0.5)

    def forward(self, batch: PackedBatch | TokenBatch) -> Tensor:
        outputs = self.trunk(batch)
        return self.head(outputs if self.per_prefix else outputs[:, 0])


class HLIPModel(Saved):
    """Study encoder and text tower with a shared embedding.

    Args:
        text_source, pretrained_text: see `TextTower`.
    """

    logit_scale: nn.Parameter

    def __init__(self, config: ModelConfig, text_source: Source | None = None, pretrained_text: bool = False) -> None:
        super().__init__()
        self.config = config
        self.visual = VisualTower(config)
        self.text = TextTower(config.text, config.embed_dim, text_source, pretrained_text)
        self.objective = OBJECTIVES[config.objective]
        for name, value in self.objective.begin.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value)))

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
        """The embeddings that the objective compares, for its loss.

        Args:
            texts: of the batch's studies, as the objective's `texts` gives them; or their (N, W) `TextTower.features`.
        """
        image = self.encode_image(batch)
        image = image[:, : self.objective.pairs] if self.config.per_prefix else image[:, None]
        text = self.text.proj(texts) if isinstance(texts, Tensor) else self.text(texts)
        return self.objective.outputs(self, image, F.normalize(at_least_float32(text), dim=-1))


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
            for the encoder to begin with. See `load_vision`.
        changes: fields of `ModelConfig` to replace.

    Raises:
        ValueError: unknown name, or a part that cannot be read.
    """
    config = replace(preset(name), **changes)
    if isinstance(pretrained_text, (str, Path)):
        config = replace(config, text=replace(config.text, name=str(pretrained_text)))
    model = HLIPModel(config, pretrained_text=bool(pretrained_text))
    if pretrained_vision is not None:
        load_vision(model.visual.trunk, pretrained_vision)
    return model


def load_vision(encoder: StudyEncoder, source: Path | str) -> None:
    """Give `encoder` the weights of a 2D ViT: a MAE or timm checkpoint, a folder of one, or a hub name.

    The patch projection is inflated by averaging, positions in the plane are repeated over depth and added to the
    1D ones of depth, and a cls token takes its own position with it. Register tokens stay as they are.

    Raises:
        ValueError: not such weights, or of another width or depth; names file and keys.

    Source: HLIP (arXiv 2505.21862), section 3.2 and appendix B; MAE (arXiv 2111.06377).
    """
    path = Path(source)
    try:
        path = path if path.is_file() else find_weights(local_folder(str(source), weights=True))
    except ValueError as error:
        raise ValueError(f"pretrained vision {str(source)!r}: {error}") from error
    flat = read_weights(path).state
    aside = sorted(key for key in flat if key.startswith(ASIDE))
    if aside:
        log.warning("%s: %d weights of a classifier or decoder left aside: %s", path, len(aside), shorten(aside, 3))
    state = {key: value for key, value in flat.items() if key not in aside}
    config = encoder.config
    patch, positions = state.pop("patch_embed.proj.weight", None), state.pop("pos_embed", None)
    if patch is None or positions is None or patch.ndim != 4 or positions.ndim != 3 or len(positions) != 1:
        wrong = "patch_embed.proj.weight" if patch is None or patch.ndim != 4 else "pos_embed"
        raise ValueError(f"{path}: not a 2D vision transformer: no {wrong} of its shape")
    if {patch.shape[0], positions.shape[2]} != {config.width}:
        raise ValueError(f"{path}: its width is {patch.shape[0]}, the encoder's {config.width}")
    for key, value in {"patch_embed.proj.weight": patch, "pos_embed": positions}.items():
        if not (value.is_floating_point() and value.isfinite().all()):
            raise ValueError(f"{path}: {key} is not of finite numbers")
    count = positions.shape[1]
    if math.isqrt(count) ** 2 != count:
        if math.isqrt(count - 1) ** 2 != count - 1:
            raise ValueError(
                f"{path}: pos_embed has {count} rows: neither a square of patches, nor that and a cls token"
            )
        if "cls_token" in state and state["cls_token"].shape == (1, 1, config.width):
            state["cls_token"] = state["cls_token"] + positions[:, :1]
        positions = positions[:, 1:]
    if config.num_prefix == 0:
        state.pop("cls_token", None)
    state["patch_embed.proj.weight"] = inflate_patches(patch, config.patch_size)
    state["spatial_posemb"] = inflate_positions(positions, config.grid)
    load_strict(encoder, state, path, OWN)


def inflate_patches(weight: Tensor, patch_size: Grid) -> Tensor:
    """(C, 3, p, p) to (C, 1, pd, ph, pw): resized, summed over colours, and shared out evenly over pd slices."""
    pd, ph, pw = patch_size
    weight = weight.float()
    if weight.shape[2:] != (ph, pw):
        weight = F.interpolate(weight, size=(ph, pw), mode="bicubic")
    return weight.sum(1, keepdim=True)[:, :, None].repeat(1, 1, pd, 1, 1) / pd


def inflate_positions(positions: Tensor, grid: Grid) -> Tensor:
    """(1, n * n, C) to (1, d, h, w, C): resized as timm resizes them, plus sines and cosines over depth."""
    side, width = math.isqrt(positions.shape[1]), positions.shape[2]
    plane = positions.float().reshape(1, side, side, width).permute(0, 3, 1, 2)
    if (side, side) != tuple(grid[1:]):
        plane = F.interpolate(plane, size=grid[1:], mode="bicubic", antialias=True)
    depth = sincos(np.arange(grid[0]), width)[None, :, None, None]
    return torch.add(plane.permute(0, 2, 3, 1)[:, None], depth)
