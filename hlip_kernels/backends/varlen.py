"""PyTorch's own attention over packed sequences, `torch.nn.attention.varlen`, as a backend.

Under its ops lies PyTorch's FlashAttention 2, or what `torch.nn.attention.activate_flash_attention_impl` has put there.
They read q, k, v as views, but return gradients in memory of their own: these are copied into the views that are given,
once each (3 R H D elements read, and as many written). Backward has no `seqused`. It adds the gradients of queries
atomically, or in a fixed order if PyTorch is set to deterministic algorithms, which a call can only be by a setting of
the whole process.

The "FA4" of torch 2.13 takes releases of flash-attn-4 whose forward returns two values; that of 4.0.0b36 returns five.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .base import QKV, Spans
from .external import LibraryBackend, deterministic_algorithms, flash_not_supported_reasons


class Varlen(LibraryBackend):
    name = "varlen"
    package = "torch"
    repeats = "on request"

    def is_installed(self) -> bool:
        return importlib.util.find_spec("torch.nn.attention.varlen") is not None

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        reasons = flash_not_supported_reasons(device, dtype, head_dim)
        if not self.is_installed():
            reasons.insert(0, f"torch {torch.__version__} has no torch.nn.attention.varlen (pip install -U torch)")
        elif device == "cuda":
            if "scale" not in _arguments():
                reasons.insert(0, f"varlen_attn of torch {torch.__version__} takes no scale (pip install -U torch)")
            if not torch.backends.cuda.is_flash_attention_available():
                reasons.insert(0, "this torch was built without FlashAttention")
        return reasons

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"scale": softmax_scale}
        arguments = _arguments()
        if "num_splits" in arguments:  # or FlashAttention-3 may split keys as it sees fit
            options["num_splits"] = 1
        if keys.seqused is not None:
            if "seqused_k" not in arguments:
                raise ValueError(f"varlen_attn of torch {torch.__version__} takes no seqused_k (pip install -U torch)")
            options["seqused_k"] = keys.seqused
        out, lse, _ = _ops()._varlen_attn(q, k, v, *_bounds(queries, keys), **options)
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
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: there is none, nobody reads it
        with deterministic_algorithms(deterministic):
            results = _ops()._varlen_attn_backward(
                grad_out, q, k, v, out, lse, *_bounds(queries, keys), False, rng_state, scale=softmax_scale
            )
        torch._foreach_copy_(grads, results)


def _ops() -> Any:
    importlib.import_module("torch.nn.attention.varlen")  # registers them
    return torch.ops.torch_attn


def _arguments() -> set[str]:
    return {argument.name for argument in _ops()._varlen_attn.default._schema.arguments}


def _bounds(queries: Spans, keys: Spans) -> tuple[Tensor, Tensor, int, int]:
    return queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen
