"""The drop-in layer, and hierarchical attention inside models that keep their tokens in dense batches.

Shapes: B dense rows (images, volumes), L = P + N tokens of each: P prefix rows, then N patches; H heads, D head dim,
C width. Neither transformers nor MONAI is imported until it is used.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .attention import hier_attention
from .backends import BACKENDS
from .layout import LEVELS, Grid, Level, StudyLayout, check_level
from .linear import is_plain, linear
from .norm import regroup


class HierarchicalAttention(nn.Module):
    """Multi-head self-attention over the groups of a packed batch.

    Parameter names and shapes are those of a ViT block's attention in timm (`qkv`, `q_norm`, `k_norm`, `proj`),
    so its weights load unchanged.

    Args:
        dim: width C; a multiple of `num_heads`.
        num_heads: H.
        qkv_bias, proj_bias: whether the two projections have a bias.
        backend: see `hier_attention`.
        qk_norm: whether each head's queries and keys pass a LayerNorm (with the epsilon of timm's ViTs).

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`, or an unknown backend.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        backend: str = "auto",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"unknown backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
        self.dim = dim
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, layout: StudyLayout, level: Level, rotary: Tensor | None = None) -> Tensor:
        """x: (R, C), group after group (see `hier_attention`); rotary: see `rotate`. Returns the shape of x.

        Raises:
            ValueError: x of another width, or anything that `hier_attention` refuses.
        """
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected (rows, {self.dim}), got {tuple(x.shape)}")
        return self.attend(self.qkv(x), layout, level, rotary)

    def attend(self, qkv: Tensor, layout: StudyLayout, level: Level, rotary: Tensor | None = None) -> Tensor:
        """What follows the first projection: (R, 3 C) to (R, C)."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        if not (is_plain(self.q_norm, nn.Identity) and is_plain(self.k_norm, nn.Identity)):
            # Packed anew, as backward of the norms reads what they were given. On GPUs autocast makes them float32.
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v], dim=1)
        if rotary is not None:
            qkv = rotate(qkv, rotary)
        out = hier_attention(qkv, layout, level, backend=self.backend).flatten(1)
        return linear(self.proj, out)

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("torch.jit.script knows no StudyLayout. Use torch.compile, or torch.export.")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, backend={self.backend!r}"


def rotate(qkv: Tensor, rotary: Tensor) -> Tensor:
    """Turn queries and keys by rotary positions: dimensions 2 j and 2 j + 1, (x, y), to
    (x cos - y sin, y cos + x sin).

    Args:
        qkv: (R, 3, H, D)
        rotary: (R, 2, N) - the cosines, then the sines, of each row's angles of the first N pairs of dimensions; others
            stay as they are. A row that is not to be turned has the angle 0.

    Returns:
        (R, 3, H, D)

    Source: RoFormer (arXiv 2104.09864), section 3.4.2.
    """
    cos, sin = rotary[:, :, None, None].unbind(1)
    x, y = qkv[:, :2, :, : 2 * cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([x * cos - y * sin, y * cos + x * sin], dim=-1).flatten(-2).to(qkv.dtype)
    return torch.cat([torch.cat([turned, qkv[:, :2, :, turned.shape[-1] :]], dim=-1), qkv[:, 2:]], dim=1)


def dense_attention(
    qkv: Tensor, layout: StudyLayout, level: Level, softmax_scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """`hier_attention` on a dense batch, each of whose rows is one group (a slice, scan or study) of `layout`.

    Which of the three follows from the shapes. At that level, the dense batch is the packed one, and nothing is copied.
    If `level` is another one, the rows of q, k and v are moved to it before attention and the results moved back (see
    `regroup`), in every call; HLIP's own encoder moves rows where the level changes, in a pass that it makes anyway.

    Args:
        qkv: (B, L, 3, H, D)
        layout: the groups of the B * N patches, with P prefix rows.
        level: the level to attend at.
        softmax_scale, backend: see `hier_attention`.

    Returns:
        (B, L, H, D)

    Raises:
        ValueError: the rows are not the groups of any level, or what `hier_attention` raises.
    """
    check_level(level)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: expected (batch, tokens, 3, heads, head_dim), got {tuple(qkv.shape)}")
    batch, tokens = qkv.shape[:2]
    home = _level_of_rows(layout, batch, tokens)
    packed = qkv.flatten(0, 1)
    if level != home:
        packed = regroup(packed.flatten(1), layout, home, level).unflatten(1, qkv.shape[2:])
    out = hier_attention(packed, layout, level, softmax_scale, backend)
    if level != home:
        out = regroup(out.flatten(1), layout, level, home).unflatten(1, qkv.shape[3:])
    return out.view(batch, tokens, *qkv.shape[3:])


def _level_of_rows(layout: StudyLayout, batch: int, tokens: int) -> Level:
    for level in LEVELS:  # two levels that both fit have the same groups
        if layout.num_groups(level) == batch and (layout.seqlens(level) + layout.num_prefix == tokens).all():
            return level
    raise ValueError(
        f"{batch} rows of {tokens} tokens ({layout.num_prefix} of them prefix) are not the slices, scans or studies of "
        f"{layout}"
    )


def register_transformers(name: str = "hlip") -> None:
    """Make `model.set_attn_implementation(name)` known to transformers. Weights stay as they are.

    The model is then called with two keywords more, `layout` and `level` ("study" if left out), which reach every
    layer: `model(pixel_values, layout=layout, level="scan")`. Its images are the slices, scans or studies of the
    layout (see `dense_attention`). An attention module with an attribute `hlip_level` keeps to that level.

    The attention raises ValueError for all that it would get wrong: no layout (older versions of transformers, and
    some models, pass no keywords on), a mask that hides a token, causal models, dropout, biases, grouped heads, or
    `output_attentions`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, _transformers_attention)
    # Without it, masks of this implementation are dropped. It makes none where all tokens are visible.
    AttentionMaskInterface.register(name, sdpa_mask)


def _transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    layout: StudyLayout | None = None,
    level: Level = "study",
    **options: Any,
) -> tuple[Tensor, None]:
    """query, key, value: (B, H, L, D). Returns (B, L, H, D) and no weights."""
    if layout is None:
        raise ValueError(
            "no layout came to the attention: call the model with layout=...; if you did, this version of transformers "
            "does not pass keywords on to this model's layers"
        )
    if attention_mask is not None:
        raise ValueError("attention_mask: a mask that hides tokens is not supported; a group attends to all of its own")
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:  # as sdpa reads it
        raise ValueError("is_causal: attention within groups is bidirectional")
    _refuse_dropout(dropout)
    for option in ("position_bias", "softcap", "s_aux", "output_attentions"):
        if options.get(option) is not None and options[option] is not False:
            raise ValueError(f"{option} is not supported")
    if not query.shape == key.shape == value.shape:
        raise ValueError(
            "query, key and value must have one shape (no cross-attention, no grouped heads), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], dim=2)
    return dense_attention(qkv, layout, getattr(module, "hlip_level", level), scaling), None


class MonaiAttention(nn.Module):
    """Takes the place of the `SABlock` in a block of MONAI's ViT: `block.attn = MonaiAttention(block.attn, grid)`.

    Holds that block's own `qkv` and `out_proj`, so parameters, their names and order, and checkpoints stay
    the same.

    Args:
        block: a `monai.networks.blocks.SABlock`.
        grid: patches along each axis of the volume. Every volume is a study of one scan; its slices lie along the
            first axis. Rows beyond the grid's are prefix rows (one with `classification=True`).
        level: the level to attend at (see `dense_attention`).
        backend: see `hier_attention`.

    Raises:
        ValueError: the block does what this layer cannot: separate q, k, v projections, causal attention, relative
            positions, saved weights, another attention dtype.
    """

    def __init__(self, block: Any, grid: Grid, level: Level = "study", backend: str = "auto") -> None:
        super().__init__()
        if not isinstance(getattr(block, "qkv", None), nn.Linear):
            raise ValueError(f"expected an SABlock with use_combined_linear=True, got {type(block).__name__}")
        for name in ("causal", "rel_positional_embedding", "save_attn", "attention_dtype"):
            if getattr(block, name, None) not in (None, False):
                raise ValueError(f"SABlock with {name}={getattr(block, name)} is not supported")
        self.out_proj: nn.Module = block.out_proj  # first, as in the block: optimizers count parameters
        self.qkv: nn.Module = block.qkv
        self.num_heads: int = block.num_heads
        self.dropout_rate: float = block.dropout_rate
        self.grid = grid
        self.level = check_level(level)
        self.backend = backend
        self.train(block.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """x: (B, L, C). Returns the same shape.

        Raises:
            ValueError: a mask, dropout in training, or not as many tokens as the grid has and perhaps a cls token.
        """
        if attn_mask is not None:
            raise ValueError("attn_mask: a mask is not supported; a group attends to all of its own")
        _refuse_dropout(self.dropout_rate if self.training else 0.0)
        num_prefix = x.shape[1] - math.prod(self.grid)
        if num_prefix not in (0, 1):  # without and with classification=True
            raise ValueError(f"grid {self.grid} has {math.prod(self.grid)} patches, but x has {x.shape[1]} tokens")
        plain = x.as_subclass(Tensor)  # MONAI's MetaTensor overrides methods that backends call
        qkv = self.qkv(plain).unflatten(-1, (3, self.num_heads, -1))
        layout = _equal_studies(self.grid, len(x), num_prefix, x.device)
        out: Tensor = self.out_proj(dense_attention(qkv, layout, self.level, backend=self.backend).flatten(2))
        return out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, grid={self.grid}, level={self.level!r}, backend={self.backend!r}"


@lru_cache(maxsize=8)  # one for all layers and steps
def _equal_studies(grid: Grid, batch: int, num_prefix: int, device: torch.device) -> StudyLayout:
    return StudyLayout.from_grids([[grid]] * batch, num_prefix).to(device)


def _refuse_dropout(rate: float) -> None:
    if rate > 0:
        raise ValueError(f"dropout of attention weights is not supported: set it to 0 (it is {rate}), or call eval()")
