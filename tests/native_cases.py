"""Instruction sets of the native backend that are tried, and how it is called."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import emulation
from conftest import use_native
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import AttentionBackend, Spans
from hlip_kernels.native import ISAS, native

BACKEND, REFERENCE = BACKENDS["native"], BACKENDS["reference"]
HERE = ISAS[: ISAS.index(native().isa) + 1] if native().library else ()
EMULATED = () if "amx" in HERE or emulation.WHY_NOT else ("emulated amx",)
DTYPES = [torch.float32, torch.bfloat16]
needs_library = pytest.mark.skipif(not HERE, reason=native().reason)


@pytest.fixture(params=[*HERE, *EMULATED])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param in EMULATED:
        use_native(monkeypatch, request.getfixturevalue("emulated_native"))
    else:
        use_native(monkeypatch, native()._replace(isa=request.param))
    return request.param


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def forward(way: AttentionBackend, qkv: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(1)
    return way.forward(q, k, v, spans, spans, scale)


def backward(
    way: AttentionBackend, grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float
) -> Tensor:
    """The gradient of qkv, NaN where none is written."""
    grad_qkv = torch.full_like(qkv, torch.nan)
    grad_q, grad_k, grad_v = grad_qkv.unbind(1)
    q, k, v = qkv.unbind(1)
    way.backward((grad_q, grad_k, grad_v), grad_out, q, k, v, out, lse, spans, spans, scale, True)
    return grad_qkv
