"""xformers' memory-efficient attention with a block-diagonal mask, as a backend.

Its operators keep the log-sum-exp in one of two forms: packed, (1, H, R), or padded, (G, H, longest group). Ours is the
packed one in the order of the level's tensor, so forward and backward may run on different operators.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from .external import GroupOrder, group_order
from .groups import Groups

MULTIPLES = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}  # of the head dim
PADDED_ROWS = 32  # a padded log-sum-exp has a multiple of so many


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = []
    if importlib.util.find_spec("xformers") is None:
        reasons.append("xformers is not installed (pip install xformers)")
    if device != "cuda":
        reasons.append(f"needs CUDA or ROCm tensors, got {device}")
    if dtype not in MULTIPLES:
        reasons.append(f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}")
    elif head_dim % MULTIPLES[dtype]:
        reasons.append(f"needs a head dim that is a multiple of {MULTIPLES[dtype]}, got {head_dim}")
    if not reasons and torch.cuda.is_available():
        q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
        bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
        for kind in ("FwOp", "BwOp"):
            try:
                _operator(kind, q, block_diagonal(bounds, 1))
            except (ValueError, ImportError) as error:
                reasons.append(str(error))
    return reasons


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    from xformers.ops import fmha

    order = group_order(groups, qkv.shape[0])
    mask = block_diagonal(order.cu_seqlens, order.max_seqlen)
    q, k, v = order.gather(qkv)[None].unbind(2)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, mask, scale=softmax_scale, op=_operator("FwOp", q, mask)
    )
    packed = lse[0, :, : qkv.shape[0]] if lse.shape[0] == 1 else unpad(lse, order)
    return order.scatter(out[0]), order.scatter(packed, 1)


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    from xformers.ops import fmha

    order = group_order(groups, qkv.shape[0])
    mask = block_diagonal(order.cu_seqlens, order.max_seqlen)
    q, k, v = order.gather(qkv)[None].unbind(2)
    operator = _operator("BwOp", q, mask)
    packed = order.gather(lse, 1)
    grads = fmha.memory_efficient_attention_backward(
        order.gather(grad_out)[None],
        order.gather(out)[None],
        packed[None] if operator.VARLEN_LSE_PACKED else pad(packed, order),
        q,
        k,
        v,
        mask,
        scale=softmax_scale,
        op=operator,
    )
    return order.scatter(torch.stack(grads, 2)[0])


def block_diagonal(cu_seqlens: Tensor, max_seqlen: int) -> Any:
    """xformers' mask, without its copy of the bounds on the host: no operator of ours reads it."""
    from xformers.ops.fmha import attn_bias

    info = attn_bias._SeqLenInfo(seqstart=cu_seqlens, max_seqlen=max_seqlen, min_seqlen=0, seqstart_py=[])
    return attn_bias.BlockDiagonalMask(q_seqinfo=info, k_seqinfo=info)


def unpad(lse: Tensor, order: GroupOrder) -> Tensor:
    """(G, H, longest group or more) to (H, R), both in the order of groups."""
    return lse[order.group, :, order.offset].T.contiguous()


def pad(lse: Tensor, order: GroupOrder) -> Tensor:
    """The inverse of `unpad`: infinite where no row is, so that exp(score - lse) is 0."""
    num_groups = order.cu_seqlens.shape[0] - 1
    longest = -(-order.max_seqlen // PADDED_ROWS) * PADDED_ROWS
    padded = lse.new_full((num_groups, lse.shape[0], longest), math.inf)
    padded[order.group, :, order.offset] = lse.T
    return padded


def _operator(kind: str, q: Tensor, mask: Any) -> Any:
    """The first operator that takes such tensors, in the order in which xformers prefers them."""
    from xformers.ops import fmha

    inputs = fmha.Inputs(q, q, q, mask, scale=1.0)
    refused = []
    for operator in (getattr(module, kind) for module in (fmha.flash3, fmha.flash, fmha.cutlass, fmha.ck)):
        reasons = operator.not_supported_reasons(inputs)
        if not reasons:
            return operator
        refused.append(f"{operator.NAME}: {', '.join(reasons)}")
    raise ValueError(f"no operator of xformers can run: {'; '.join(refused)}")
