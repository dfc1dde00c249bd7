"""PyTorch's own attention over packed sequences, `torch.nn.attention.varlen`, as a backend.

Backward adds atomically, unless `torch.use_deterministic_algorithms(True)` is set.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .external import flash_not_supported_reasons, group_order
from .groups import Groups


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = flash_not_supported_reasons(device, dtype, head_dim)
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        reasons.insert(0, f"torch {torch.__version__} has no torch.nn.attention.varlen (pip install -U torch)")
    elif device == "cuda":
        arguments = _ops()._varlen_attn.default._schema.arguments
        if "scale" not in [argument.name for argument in arguments]:
            reasons.insert(0, f"varlen_attn of torch {torch.__version__} takes no scale (pip install -U torch)")
        if not torch.backends.cuda.is_flash_attention_available():
            reasons.insert(0, "this torch was built without FlashAttention")
    return reasons


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    order = group_order(groups, qkv.shape[0])
    bounds, longest = order.cu_seqlens, order.max_seqlen
    q, k, v = order.gather(qkv).unbind(1)
    out, lse, _ = _ops()._varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=softmax_scale)
    return order.scatter(out), order.scatter(lse, 1)


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    order = group_order(groups, qkv.shape[0])
    bounds, longest = order.cu_seqlens, order.max_seqlen
    grads = _ops()._varlen_attn_backward(
        order.gather(grad_out),
        *order.gather(qkv).unbind(1),
        order.gather(out),
        order.gather(lse, 1),
        bounds,
        bounds,
        longest,
        longest,
        is_causal=False,
        rng_state=torch.zeros(2, dtype=torch.uint64, device=qkv.device),  # of dropout, and there is none
        scale=softmax_scale,
    )
    return order.scatter(torch.stack(grads, 1))


def _ops() -> Any:
    importlib.import_module("torch.nn.attention.varlen")  # registers them
    return torch.ops.torch_attn
