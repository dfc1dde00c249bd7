"""The drop-in layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends import BACKENDS
from .functional import hier_attention
from .layout import Level, StudyLayout
from .linear import Linear, is_fusible, is_plain, linear


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

    def forward(self, x: Tensor, layout: StudyLayout, level: Level) -> Tensor:
        """x: (R, C), group after group (see `hier_attention`). Returns the same shape.

        Raises:
            ValueError: x of another width, or anything that `hier_attention` refuses.
        """
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x: expected (rows, {self.dim}), got {tuple(x.shape)}")
        return self.attend(self.qkv(x), layout, level)

    def attend(self, qkv: Tensor, layout: StudyLayout, level: Level) -> Tensor:
        """What follows the first projection: (R, 3 C) to (R, C)."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        if not (is_plain(self.q_norm, nn.Identity) and is_plain(self.k_norm, nn.Identity)):
            # Packed anew, as backward of the norms reads what they were given. On GPUs autocast makes them float32.
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v], dim=1)
        out = hier_attention(qkv, layout, level, backend=self.backend).flatten(1)
        if not is_fusible(self.proj):
            projected: Tensor = self.proj(out)
        elif torch.is_grad_enabled():
            projected = Linear.apply(out, self.proj.weight, self.proj.bias)  # type: ignore[no-untyped-call]
        else:
            projected = linear(out, self.proj.weight, self.proj.bias)
        return projected

    def __prepare_scriptable__(self) -> nn.Module:
        raise NotImplementedError("torch.jit.script knows no StudyLayout. Use torch.compile, or torch.export.")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, backend={self.backend!r}"
