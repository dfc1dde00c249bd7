"""The drop-in layer."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import hier_attention
from .layout import Level, StudyLayout


class HierarchicalAttention(nn.Module):
    """Multi-head self-attention over the groups of a packed batch.

    Parameter names and shapes are those of a ViT block's attention in timm (`qkv`, `proj`), so its
    weights load unchanged.

    Args:
        dim: width C; a multiple of `num_heads`.
        num_heads: H.
        qkv_bias, proj_bias: whether the two projections have a bias.
        backend: see `hier_attention`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, proj_bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, layout: StudyLayout, level: Level) -> Tensor:
        """x: (G * P + T, C), prefix rows first (see `hier_attention`). Returns the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return self.proj(hier_attention(qkv, layout, level, backend=self.backend).flatten(1))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, backend={self.backend!r}"
