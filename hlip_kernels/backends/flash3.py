"""FlashAttention-3 as a backend, for Hopper. Never called: nobody has run it here on a GPU.

It is not on PyPI. `flash_attn_interface`, which wheels on PyTorch's own index and builds of flash-attention's folder
`hopper` install, registers two ops; of their arguments, these are passed:

    flash_attn_3::fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, num_splits) -> (out, softmax_lse, out_accum, softmax_lse_accum)
    flash_attn_3::bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, softmax_scale, deterministic)

Both read q, k, v as views, backward writes into the views that it is given: nothing is copied. With one split of the
keys forward is the same on every run; backward adds the gradients of queries atomically, or in a fixed order if it is
told to.

Source: hopper/flash_attn_interface.py and hopper/flash_api.cpp of github.com/Dao-AILab/flash-attention; the schemas are
those that xformers 0.0.35 checks in ops/fmha/flash3.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .base import QKV, Spans
from .external import LibraryBackend, half_reasons, head_dim_reasons, nvidia_reasons, varlen_settings

INSTALL = "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"
HOPPER = 9, 0
GROUPS = {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"}
PASSED = {"fwd": {*GROUPS, "num_splits"}, "bwd": {*GROUPS, "dq", "dk", "dv", "deterministic"}}


class Flash3(LibraryBackend):
    name = "flash3"
    package = "flash-attn-3"
    repeats = "on request"
    takes_seqused = True

    def is_installed(self) -> bool:
        return importlib.util.find_spec("flash_attn_interface") is not None

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        reasons = [*nvidia_reasons(device, HOPPER, HOPPER), *half_reasons(dtype), *head_dim_reasons(head_dim)]
        if not self.is_installed():
            return [f"FlashAttention-3 is not installed ({INSTALL})", *reasons]
        return reasons or _import_reasons()

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _ops().fwd(q, k, v, num_splits=1, **varlen_settings(queries, keys, softmax_scale))
        return out, lse

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
        settings = varlen_settings(queries, keys, softmax_scale)
        _ops().bwd(grad_out, q, k, v, out, lse, *grads, deterministic=deterministic, **settings)


def _import_reasons() -> list[str]:
    try:
        ops = _ops()
        for name, passed in PASSED.items():
            missing = passed - {argument.name for argument in getattr(ops, name).default._schema.arguments}
            if missing:
                return [f"torch.ops.flash_attn_3.{name} takes no {', '.join(sorted(missing))} ({INSTALL})"]
    except (ImportError, AttributeError) as error:  # built for another torch, or before there were ops
        return [f"FlashAttention-3 cannot be used: {error} ({INSTALL})"]
    return []


def _ops() -> Any:
    if not hasattr(torch.ops.flash_attn_3, "bwd"):
        importlib.import_module("flash_attn_interface")  # registers them
    return torch.ops.flash_attn_3
