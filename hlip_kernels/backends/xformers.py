"""xformers' memory-efficient attention with a block-diagonal mask, as a backend.

xformers has an operator for each kernel, and this takes the first that can run in the order that xformers prefers; not
always the same one in forward and in backward:

    fa3F, fa3B          FlashAttention-3, where it is installed
    fa2F, fa2B          flash-attn 2, or PyTorch's own FlashAttention where that is not installed
    cutlassF, cutlassB  PyTorch's kernels of CUTLASS, for fp32 and for older GPUs
    ckF, ckB            for GPUs of AMD

All read q, k, v as views. All return gradients in memory of their own. Behind the operators of FlashAttention-3 and of
flash-attn are ops that write into the views that they are given, and these are called directly, so that nothing is
copied. Gradients of the other operators are copied into the views, once each (3 R H D elements read, and as many
written). Operators keep the log-sum-exp packed, (1, H, R), or padded, (G, H, longest group): ours is the packed one.

`seqused` of keys is a mask with gaps, which operators of FlashAttention take in forward. With `deterministic` an
operator is taken that calls itself deterministic: cutlassB is, fa3B and fa2B are not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import QKV, Spans
from .external import LibraryBackend, deterministic_algorithms
from .flash import Flash
from .flash3 import Flash3

MULTIPLES = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}  # of the head dim
PADDED_ROWS = 32  # a padded log-sum-exp has a multiple of so many


class Xformers(LibraryBackend):
    name = "xformers"
    package = "xformers"
    repeats = "on request"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        reasons = []
        if not self.is_installed():
            reasons.append("xformers is not installed (pip install xformers)")
        if device != "cuda":
            reasons.append(f"needs CUDA or ROCm tensors, got {device}")
        if dtype not in MULTIPLES:
            reasons.append(f"needs float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}")
        elif head_dim % MULTIPLES[dtype]:
            reasons.append(f"needs a head dim that is a multiple of {MULTIPLES[dtype]}, got {head_dim}")
        if not reasons and torch.cuda.is_available():
            reasons += _operator_reasons("FwOp", device, dtype, head_dim)
            reasons += _operator_reasons("BwOp", device, dtype, head_dim)
        return reasons

    def not_repeating_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        if not torch.cuda.is_available() or self.not_supported_reasons(device, dtype, head_dim):
            return []
        with deterministic_algorithms(True):
            return _operator_reasons("BwOp", device, dtype, head_dim)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        from xformers.ops import fmha

        mask = block_diagonal(queries, keys)
        operator = _operator("FwOp", q, k, v, mask)
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(
            q[None], k[None], v[None], mask, scale=softmax_scale, op=operator
        )
        packed = lse[0, :, : q.shape[0]].contiguous() if lse.shape[0] == 1 else unpad(lse, queries, q.shape[0])
        return out[0], packed

    def _backward(
        self,
        grads: QKV,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        queries: Spans,
        keys: Spans,
        softmax_scale: float,
        deterministic: bool,
    ) -> None:
        from xformers.ops import fmha

        mask = block_diagonal(queries, keys)
        with deterministic_algorithms(deterministic):
            operator = _operator("BwOp", q, k, v, mask)
            behind = _behind(operator)
            if behind is not None:
                tensors = grad_out, q, k, v, out, lse
                behind._backward(grads, *tensors, queries, keys, softmax_scale, deterministic)
                return
            kept = lse[None] if operator.VARLEN_LSE_PACKED else pad(lse, queries)
            tensors = grad_out[None], out[None], kept, q[None], k[None], v[None]
            results = fmha.memory_efficient_attention_backward(*tensors, mask, scale=softmax_scale, op=operator)
        torch._foreach_copy_(grads, [result[0] for result in results])


def block_diagonal(queries: Spans, keys: Spans) -> Any:
    """xformers' mask, without its copy of the bounds on the host: no operator of ours reads it."""
    from xformers.ops.fmha import attn_bias

    q_info, k_info = (
        {"seqstart": spans.cu_seqlens, "max_seqlen": spans.max_seqlen, "min_seqlen": 0, "seqstart_py": []}
        for spans in (queries, keys)
    )
    q_seqinfo = attn_bias._SeqLenInfo(**q_info)
    if keys.seqused is None:
        return attn_bias.BlockDiagonalMask(q_seqinfo=q_seqinfo, k_seqinfo=attn_bias._SeqLenInfo(**k_info))
    k_seqinfo = attn_bias._GappySeqInfo(**k_info, seqlen=keys.seqused, seqlen_py=[])
    return attn_bias.BlockDiagonalGappyKeysMask(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)


def unpad(lse: Tensor, spans: Spans, num_rows: int) -> Tensor:
    """(G, H, longest group or more) to (H, R)."""
    group, offset = _places(spans, num_rows)
    return lse[group, :, offset].T.contiguous()


def pad(lse: Tensor, spans: Spans) -> Tensor:
    """The inverse of `unpad`: infinite where no row is, so that exp(score - lse) is 0."""
    group, offset = _places(spans, lse.shape[1])
    longest = -(-spans.max_seqlen // PADDED_ROWS) * PADDED_ROWS
    padded = lse.new_full((spans.cu_seqlens.shape[0] - 1, lse.shape[0], longest), math.inf)
    padded[group, :, offset] = lse.T
    return padded


def _places(spans: Spans, num_rows: int) -> tuple[Tensor, Tensor]:
    """The group of each row, and where it is in its group: (R) int64 each."""
    rows = torch.arange(num_rows, dtype=torch.int32, device=spans.cu_seqlens.device)
    group = torch.searchsorted(spans.cu_seqlens[1:], rows, right=True)  # a group without rows is nobody's
    return group, rows.long() - spans.cu_seqlens[group]


def _operator_reasons(kind: str, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    q = torch.empty(1, 1, head_dim, dtype=dtype, device=device)
    spans = Spans(torch.tensor([0, 1], dtype=torch.int32, device=device), [], 1)
    try:
        _operator(kind, q, q, q, block_diagonal(spans, spans))
    except (ValueError, ImportError) as error:
        return [str(error)]
    return []


def _operator(kind: str, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
    """The first operator that takes such tensors, in the order in which xformers prefers them."""
    from xformers.ops import fmha

    inputs = fmha.Inputs(q[None], k[None], v[None], mask, scale=1.0)
    refused = []
    for operator in (getattr(module, kind) for module in (fmha.flash3, fmha.flash, fmha.cutlass, fmha.ck)):
        reasons = operator.not_supported_reasons(inputs)
        if not reasons:
            return operator
        refused.append(f"{operator.NAME}: {', '.join(reasons)}")
    raise ValueError(f"no operator of xformers can run: {'; '.join(refused)}")


def _behind(operator: Any) -> LibraryBackend | None:
    """The backend of the ops behind an operator of backward, if these write into the gradients that they are given."""
    from xformers.ops import fmha

    if operator is fmha.flash3.BwOp:
        return Flash3()
    return Flash() if operator is fmha.flash.BwOp and not fmha.flash._USE_PT_FLASH_ATTN else None
