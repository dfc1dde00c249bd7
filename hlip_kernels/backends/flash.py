"""flash-attn 2 as a backend: its ops for packed sequences, without its autograd.

The ops take the same arguments by name from flash-attn 2.7 on. They read q, k, v as views and write the gradients into
the views that they are given: nothing is copied. Backward has no `seqused`. Its keys' and values' gradients are each
added up by one block, those of queries atomically, or in a fixed order if it is told to.

Source: flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp of github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor

from .base import QKV, Spans
from .external import LibraryBackend, flash_not_supported_reasons, installed, lengths

OLDEST = (2, 7)


class Flash(LibraryBackend):
    name = "flash"
    package = "flash-attn"
    repeats = "on request"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        reasons = flash_not_supported_reasons(device, dtype, head_dim)
        version = installed(self.package)
        if version is None:
            return ["flash-attn is not installed (pip install flash-attn --no-build-isolation)", *reasons]
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
            reasons.insert(0, f"needs flash-attn {'.'.join(map(str, OLDEST))} or newer, got {version}")
        if not reasons:
            try:
                _ops()
            except ImportError as error:  # built for another torch, most often
                reasons.append(f"flash-attn {version} cannot be imported: {error}")
        return reasons

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _ops()._flash_attn_varlen_forward(
            q=q, k=k, v=v, seqused_k=keys.seqused, **_settings(queries, keys, softmax_scale)
        )
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
        dq, dk, dv = grads
        _ops()._flash_attn_varlen_backward(
            dout=grad_out,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=deterministic,
            **_settings(queries, keys, softmax_scale),
        )


def _ops() -> Any:
    importlib.import_module("flash_attn.flash_attn_interface")  # registers them
    return torch.ops.flash_attn


def _settings(queries: Spans, keys: Spans, softmax_scale: float) -> dict[str, Any]:
    return {
        **lengths(queries, keys),
        "dropout_p": 0.0,
        "softmax_scale": softmax_scale,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
