"""Problems that other libraries' backends solve like the reference, and what they copy and wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from copies import Copies
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import AttentionBackend, Spans
from slow_kernels import HEAD_DIM, PATCHES, QUERIES, SlowKernels, view
from spans import HEADS, SCALE, plain_spans


class Problem(NamedTuple):
    """Attention and its gradients, of slots of packed tensors.

    packed: (R, 3, H, D), or that of queries and that of keys; the same of grads.
    """

    queries: Spans
    keys: Spans
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor

    @classmethod
    def of_self(cls, lengths: Sequence[int], num_prefix: int) -> Problem:
        torch.manual_seed(0)
        spans = plain_spans(lengths, num_prefix)
        qkv = torch.randn(int(spans.cu_seqlens[-1]), 3, HEADS, HEAD_DIM, dtype=torch.float64)
        return cls(spans, spans, *qkv.unbind(1), torch.randn_like(qkv[:, 0]))

    @classmethod
    def of_two(cls, queries: Spans, keys: Spans, num_prefix: int) -> Problem:
        """Queries of their own; keys that begin behind the prefix rows of the first group, NaN where there are none."""
        torch.manual_seed(0)
        packed = torch.randn(int(queries.cu_seqlens[-1]), 3, HEADS, HEAD_DIM, dtype=torch.float64)
        kv = torch.full((int(keys.cu_seqlens[-1]), 2, HEADS, HEAD_DIM), torch.nan, dtype=torch.float64)
        k, v = kv[num_prefix:].unbind(1)
        used = keys.cu_seqlens.diff() if keys.seqused is None else keys.seqused
        for begin, n in zip(keys.cu_seqlens.tolist(), used.tolist(), strict=False):
            k[begin : begin + n].normal_()
            v[begin : begin + n].normal_()
        return cls(queries, keys, packed[:, 1], k, v, torch.randn_like(packed[:, 1]))

    def new_grads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slots of new packed tensors."""
        q = torch.full((self.q.shape[0], 3, *self.q.shape[1:]), torch.nan, dtype=self.q.dtype)
        kv = q if self.k.shape == self.q.shape else q.new_full((self.k.shape[0], 3, *self.k.shape[1:]), torch.nan)
        return q[:, 0], kv[:, 1], kv[:, 2]

    def run(self, backend: AttentionBackend, deterministic: bool = False) -> tuple[Tensor, ...]:
        """out, lse and the gradients."""
        spans, grads = (self.queries, self.keys), self.new_grads()
        out, lse = backend.forward(self.q, self.k, self.v, *spans, SCALE)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        backend.backward(
            grads, self.grad_out, self.q, self.k, self.v, out, lse, *spans, SCALE, deterministic=deterministic
        )
        return out, lse, *grads


def check_against_reference(name: str, problem: Problem, deterministic: bool = False) -> SlowKernels:
    """Out, lse and gradients, from kernels that are given views of the packed tensors. Returns the kernels."""
    expected = problem.run(BACKENDS["reference"])
    with SlowKernels() as kernels, Waits() as waits:
        got = problem.run(BACKENDS[name], deterministic)
    torch.testing.assert_close(got, expected, equal_nan=True)
    of_inputs = [view(x) for x in (problem.q, problem.k, problem.v)]
    assert kernels.read == [of_inputs, of_inputs]
    assert kernels.written in ([], [[view(x) for x in got[2:]]])
    assert kernels.deterministic == [deterministic]
    assert not waits.seen
    return kernels


class Waits(TorchDispatchMode):
    """seen: the ops that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


OPS = {
    "flash4": ["_flash_attn_fwd", "_flash_attn_bwd"],
    "flash3": ["flash_attn_3.fwd", "flash_attn_3.bwd"],
    "flash": ["flash_attn._flash_attn_varlen_forward", "flash_attn._flash_attn_varlen_backward"],
    "varlen": ["torch_attn._varlen_attn", "torch_attn._varlen_attn_backward"],
    "xformers": ["aten._efficient_attention_forward", "aten._efficient_attention_backward"],
}


def skip_without(name: str) -> None:
    if name in ("varlen", "xformers"):
        pytest.importorskip({"varlen": "torch.nn.attention.varlen"}.get(name, name))


def unequal(used: bool) -> Problem:
    """Few queries a study, over all rows of studies or, with `used`, over their patches, in place."""
    keys = plain_spans(PATCHES, 2, PATCHES) if used else plain_spans(PATCHES)
    return Problem.of_two(plain_spans(QUERIES), keys, 2 if used else 0)


def forward_alone(name: str, problem: Problem) -> None:
    """`seqused` of keys is for forward alone, and says so in backward."""
    expected = problem.run(BACKENDS["reference"])
    spans, message = (problem.queries, problem.keys), f"backend '{name}': seqused of keys must be None"
    with SlowKernels():
        out, lse = BACKENDS[name].forward(problem.q, problem.k, problem.v, *spans, SCALE)
        torch.testing.assert_close((out, lse), expected[:2])
        tensors = problem.grad_out, problem.q, problem.k, problem.v, out, lse
        with pytest.raises(ValueError, match=message):
            BACKENDS[name].backward(problem.new_grads(), *tensors, *spans, SCALE, False)


def copies(name: str) -> tuple[list[str], list[str]]:
    """The ops of forward and of backward that copy as much as a token tensor."""
    problem = Problem.of_self((33, 64, 7), 2)
    spans = problem.queries, problem.keys
    seen = []
    with SlowKernels():
        with Copies(problem.q.numel()) as of_forward:
            out, lse = BACKENDS[name].forward(problem.q, problem.k, problem.v, *spans, SCALE)
        seen.append(of_forward.seen)
        tensors = problem.grad_out, problem.q, problem.k, problem.v, out, lse
        with Copies(problem.q.numel()) as of_backward:
            BACKENDS[name].backward(problem.new_grads(), *tensors, *spans, SCALE, False)
        seen.append(of_backward.seen)
    return seen[0], seen[1]
