"""flash-attn-4 as a backend: FlashAttention in CuTe, for Hopper and Blackwell.

`flash_attn.cute.interface` reads q, k, v as views and writes the gradients into the views that it is given: nothing is
copied, as long as rows and heads begin at multiples of 16 bytes. Forward does not split keys, and is the same on every
run. Backward adds the gradients of queries atomically, or in a fixed order if it is told to, which it can not on
compute capability 12.x.

Kernels are compiled when they are first called, in some seconds, and again for another head dim or dtype, for groups
that fit one tile, and for more than 256 groups. They last as long as the process; on disk, too, if the environment has
FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1.

All releases are betas so far, and the two functions are not part of what the package exports: see `TESTED`. flash-attn
2 brings an older flash_attn/cute: where both are to be used, flash-attn-4 is installed last.

Source: flash_attn/cute/interface.py of github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from .base import QKV, Spans
from .external import (
    FLASH_HEAD_DIM,
    LibraryBackend,
    capability,
    half_reasons,
    head_dim_reasons,
    installed,
    nvidia_reasons,
    varlen_settings,
)

TESTED = "4.0.0b36"
INSTALL = f"pip install flash-attn-4=={TESTED}"
REPAIR = f"pip install --no-deps --force-reinstall flash-attn-4=={TESTED}"
OLDEST, NEWEST = (9, 0), (12, 9)  # forward runs from 8.0 on, backward does not
PASSED = {
    "_flash_attn_fwd": {"seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "num_splits", "return_lse"},
    "_flash_attn_bwd": {"seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", "dq", "dk", "dv", "deterministic"},
}


class Flash4(LibraryBackend):
    name = "flash4"
    package = "flash-attn-4"
    repeats = "on request"
    takes_seqused = True

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        reasons = [*nvidia_reasons(device, OLDEST, NEWEST), *half_reasons(dtype), *_head_dim_reasons(head_dim)]
        version = installed(self.package)
        if version is None:
            return [f"flash-attn-4 is not installed ({INSTALL})", *reasons]
        return reasons or _import_reasons(version)

    def not_repeating_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        if (capability() or OLDEST)[0] == 12:
            return ["its gradients are not the same bits on every run on a GPU of compute capability 12.x"]
        return []

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        settings = varlen_settings(queries, keys, softmax_scale)
        out, lse, *_ = _interface()._flash_attn_fwd(q, k, v, return_lse=True, num_splits=1, **settings)
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
        if deterministic and (reasons := self.not_repeating_reasons(q.device.type, q.dtype, q.shape[2])):
            raise ValueError(f"backend 'flash4': {reasons[0]}. Take backend triton, or deterministic=False.")
        dq, dk, dv = grads
        settings = varlen_settings(queries, keys, softmax_scale)
        _interface()._flash_attn_bwd(
            q, k, v, out, grad_out, lse, dq=dq, dk=dk, dv=dv, deterministic=deterministic, **settings
        )


def _head_dim_reasons(head_dim: int) -> list[str]:
    """The limits of the current GPU; the widest if there is none to ask."""
    major = (capability() or OLDEST)[0]
    if major == 9 or (major in (10, 11) and head_dim == FLASH_HEAD_DIM):
        return head_dim_reasons(head_dim)
    return head_dim_reasons(head_dim, 128)


def _import_reasons(version: str) -> list[str]:
    try:
        interface = _interface()
        for name, passed in PASSED.items():
            missing = passed - inspect.signature(getattr(interface, name)).parameters.keys()
            if missing:
                return [f"{name} of flash-attn-4 {version} takes no {', '.join(sorted(missing))} ({REPAIR})"]
    except (ImportError, AttributeError) as error:
        return [f"flash-attn-4 {version} cannot be used: {error} ({REPAIR})"]
    return []


def _interface() -> Any:
    return importlib.import_module("flash_attn.cute.interface")
