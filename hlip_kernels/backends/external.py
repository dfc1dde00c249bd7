"""What the backends of other libraries share.

q, k, v reach a library as the views that they are, and its backward writes into the views that are given, where it can:
what a library copies all the same is said in its own file. Nothing waits for the device.
"""

from __future__ import annotations

import importlib.metadata
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import QKV, AttentionBackend, Spans, check_attention, gpu_capability_reasons

FLASH_HEAD_DIM = 256
Capability = tuple[int, int]


class LibraryBackend(AttentionBackend):
    """Another library's attention over packed sequences.

    package: whose version counts, as package indexes name it.
    takes_seqused: whether both passes take `Spans.seqused`, of queries and of keys. If not, forward takes it of keys,
        and nothing else does.
    """

    package: ClassVar[str]
    takes_seqused: ClassVar[bool] = False

    def is_installed(self) -> bool:
        """Whether it is there, which says nothing of whether it can run; nothing is imported."""
        return installed(self.package) is not None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        check_attention(q, k, v, queries, keys, softmax_scale)
        self._check_seqused("queries", queries)
        with _current_device(q):
            out, lse = self._forward(_dense(q), _dense(k), _dense(v), queries, keys, softmax_scale)
        if queries is not keys:  # a group attending to itself has keys for its queries
            _settle_empty(out, lse)
        return out, lse

    def backward(
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
        check_attention(q, k, v, queries, keys, softmax_scale, out, lse, grad_out, grads)
        self._check_seqused("queries", queries)
        self._check_seqused("keys", keys)
        q, k, v, grad_out = _dense(q), _dense(k), _dense(v), _dense(grad_out)
        out, lse = out.contiguous(), lse.contiguous()
        with _current_device(q):
            self._backward(grads, grad_out, q, k, v, out, lse, queries, keys, softmax_scale, deterministic)

    def _check_seqused(self, name: str, spans: Spans) -> None:
        if spans.seqused is not None and not self.takes_seqused:
            raise ValueError(
                f"backend {self.name!r}: seqused of {name} must be None, as the library has no argument for it there. "
                "Take backend flash4, flash3, triton or reference."
            )

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out and lse; see `AttentionBackend.forward`. Either infinity may stand for no keys."""

    @abstractmethod
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
        """Write the gradients; see `AttentionBackend.backward`. out and lse are contiguous."""


def lengths(queries: Spans, keys: Spans) -> dict[str, Any]:
    """The groups, by the names that all releases of FlashAttention have for them."""
    return {
        "cu_seqlens_q": queries.cu_seqlens,
        "cu_seqlens_k": keys.cu_seqlens,
        "max_seqlen_q": queries.max_seqlen,
        "max_seqlen_k": keys.max_seqlen,
    }


def varlen_settings(queries: Spans, keys: Spans, softmax_scale: float) -> dict[str, Any]:
    """The groups, the rows that count in them and the scale, by the names of FlashAttention 3 and 4."""
    seqused = {"seqused_q": queries.seqused, "seqused_k": keys.seqused}
    return {**lengths(queries, keys), **seqused, "softmax_scale": softmax_scale}


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Have PyTorch's own ops add up in a fixed order, where they are not told so call by call.

    The setting is that of the whole process, and is put back at once.
    """
    if not wanted:
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")  # in the mode that warns, ops warn and do as always
    settings.fill_uninitialized_memory = False  # or ops would fill what they allocate
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        settings.fill_uninitialized_memory = before[1]


def _current_device(x: Tensor) -> AbstractContextManager[Any]:
    """Some libraries launch on the current GPU, wherever the tensors are."""
    return torch.cuda.device_of(x) if torch.cuda.is_available() else nullcontext()


def _dense(x: Tensor) -> Tensor:
    """x itself, unless a head's numbers lie apart: no library takes such rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _settle_empty(out: Tensor, lse: Tensor) -> None:
    empty = lse.isinf()
    lse.masked_fill_(empty, -math.inf)
    out.masked_fill_(empty.T.unsqueeze(-1), 0)


# Reasons


def flash_not_supported_reasons(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """What FlashAttention 2 asks for, whoever built it."""
    reasons = [] if device == "cuda" else [f"needs CUDA or ROCm tensors, got {device}"]
    return [*reasons, *gpu_capability_reasons(device), *half_reasons(dtype), *head_dim_reasons(head_dim)]


def nvidia_reasons(device: str, oldest: Capability, newest: Capability) -> list[str]:
    """Why there is no GPU of NVIDIA with a compute capability between these two."""
    if device != "cuda":
        return [f"needs CUDA tensors, got {device}"]
    if torch.version.hip:
        return ["needs a GPU of NVIDIA, this torch is for those of AMD"]
    got = capability()
    if got is None or oldest <= got <= newest:
        return []
    span = "{}.{}".format(*oldest) if oldest == newest else "{}.{} to {}.{}".format(*oldest, *newest)
    return [f"needs a GPU of compute capability {span}, got " + "{}.{}".format(*got)]


def capability() -> Capability | None:
    """The compute capability of the current GPU; None if there is none of NVIDIA."""
    return torch.cuda.get_device_capability() if torch.version.cuda and torch.cuda.is_available() else None


def half_reasons(dtype: torch.dtype) -> list[str]:
    if dtype in (torch.float16, torch.bfloat16):
        return []
    return [f"needs float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"]


def head_dim_reasons(head_dim: int, most: int = FLASH_HEAD_DIM) -> list[str]:
    if head_dim % 8 == 0 and head_dim <= most:
        return []
    return [f"needs a head dim that is a multiple of 8 and at most {most}, got {head_dim}"]


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
