"""flash-attn 2 as a backend: its forward and backward over packed sequences, without its autograd.

The ops take the same arguments by name from flash-attn 2.7 on. Backward is the deterministic one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

import torch
from torch import Tensor

from .external import GroupOrder, flash_not_supported_reasons, group_order
from .groups import Groups

OLDEST = (2, 7)


def not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = flash_not_supported_reasons(device, dtype, head_dim)
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return ["flash-attn is not installed (pip install flash-attn --no-build-isolation)", *reasons]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        reasons.insert(0, f"needs flash-attn {'.'.join(map(str, OLDEST))} or newer, got {version}")
    if not reasons:
        try:
            _ops()
        except ImportError as error:  # built for another torch, most often
            reasons.append(f"flash-attn {version} cannot be imported: {error}")
    return reasons


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    order = group_order(groups, qkv.shape[0])
    q, k, v = order.gather(qkv).unbind(1)
    out, lse, *_ = _ops()._flash_attn_varlen_forward(q=q, k=k, v=v, **_settings(order, softmax_scale))
    return order.scatter(out), order.scatter(lse, 1)


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    order = group_order(groups, qkv.shape[0])
    gathered = order.gather(qkv)
    q, k, v = gathered.unbind(1)
    grad_qkv = torch.empty_like(gathered)
    dq, dk, dv = grad_qkv.unbind(1)  # written in place
    _ops()._flash_attn_varlen_backward(
        dout=order.gather(grad_out),
        q=q,
        k=k,
        v=v,
        out=order.gather(out),
        softmax_lse=order.gather(lse, 1),
        dq=dq,
        dk=dk,
        dv=dv,
        deterministic=True,
        **_settings(order, softmax_scale),
    )
    return order.scatter(grad_qkv)


def _ops() -> Any:
    importlib.import_module("flash_attn.flash_attn_interface")  # registers them
    return torch.ops.flash_attn


def _settings(order: GroupOrder, softmax_scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": order.cu_seqlens,
        "cu_seqlens_k": order.cu_seqlens,
        "max_seqlen_q": order.max_seqlen,
        "max_seqlen_k": order.max_seqlen,
        "dropout_p": 0.0,
        "softmax_scale": softmax_scale,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
