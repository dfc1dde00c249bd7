"""The native backend: few queries, rows of no group, memory of any strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hlip_kernels import StudyLayout
from hlip_kernels.attention import flat_attention
from hlip_kernels.backends.base import Spans
from native_cases import BACKEND, DTYPES, backward, forward, isa, nan_filled_memory, needs_library, same_threads  # noqa: F401
from spans import SCALE, check_few_queries, plain_spans
from test_attention import RAGGED, random_qkv


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_few_queries(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    check_few_queries(BACKEND, dtype, head_dim)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_that_all_threads_share(isa: str, dtype: torch.dtype) -> None:
    """Groups with thousands of keys for few queries, and of queries for few keys."""
    torch.set_num_threads(2)
    check_few_queries(BACKEND, dtype, 128, (3, 4200, 0, 0, 70), (4200, 3, 40, 0, 300))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_have_the_same_bits_with_any_number_of_threads_and_alone(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_queries, num_keys = (70, 0, 3, 3000), (150, 20, 4200, 2)
    q, k, v = (torch.randn(sum(n), 2, 128).to(dtype) for n in (num_queries, num_keys, num_keys))
    grad_out = torch.randn(q.shape).to(dtype)

    def found(of_q: slice, of_k: slice, queries: Spans, keys: Spans) -> tuple[Tensor, ...]:
        own = q[of_q], k[of_k], v[of_k]
        out, lse = BACKEND.forward(*own, queries, keys, SCALE)
        grad_q, grad_k, grad_v = map(torch.empty_like, own)
        BACKEND.backward((grad_q, grad_k, grad_v), grad_out[of_q], *own, out, lse, queries, keys, SCALE, True)
        return out, lse.T, grad_q, grad_k, grad_v

    whole = slice(None), slice(None), plain_spans(num_queries), plain_spans(num_keys)
    expected = found(*whole)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for x, y in zip(found(*whole), expected, strict=True):
            assert torch.equal(x, y)
    starts = [(sum(num_queries[:g]), sum(num_keys[:g])) for g in range(4)]
    for (first_q, first_k), n, m in zip(starts, num_queries, num_keys, strict=True):
        of_q, of_k = slice(first_q, first_q + n), slice(first_k, first_k + m)
        alone = found(of_q, of_k, plain_spans((n,)), plain_spans((m,)))
        for x, y, rows in zip(alone, expected, (of_q, of_q, of_q, of_k, of_k), strict=True):
            assert torch.equal(x, y[rows])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_that_are_no_group_s_stay_as_they_are(isa: str, dtype: torch.dtype) -> None:
    """Every third row is used by none; it holds NaN, and nobody reads it."""
    torch.manual_seed(0)
    qkv = torch.randn(90, 3, 2, 48).to(dtype)
    bounds = torch.tensor([0, 30, 60, 90], dtype=torch.int32)
    used = torch.tensor([20, 20, 0], dtype=torch.int32)
    spans = plain_spans((30, 30, 30))._replace(cu_seqlens=bounds, seqused=used)
    in_groups = torch.arange(90) % 30 < used.repeat_interleave(30)
    alone = plain_spans((20, 20))
    out, lse = forward(BACKEND, qkv[in_groups], alone, 0.2)
    grad_out = torch.randn(90, 2, 48).to(dtype)
    grad = backward(BACKEND, grad_out[in_groups], qkv[in_groups], out, lse, alone, 0.2)
    qkv[~in_groups], grad_out[~in_groups] = torch.nan, torch.nan
    got, got_lse = forward(BACKEND, qkv, spans, 0.2)
    assert torch.equal(got[in_groups], out)
    assert torch.equal(got_lse[:, in_groups], lse)
    got_grad = backward(BACKEND, grad_out, qkv, got, got_lse, spans, 0.2)
    assert torch.equal(got_grad[in_groups], grad)
    assert got_grad[~in_groups].isnan().all()


@needs_library
def test_large_memory_of_no_group_stays_as_it_is() -> None:
    """Threads come upon each huge page of the results before they write."""
    qkv, grads = torch.ones(6000, 3, 2, 48), torch.full((6000, 3, 2, 48), 0.1)  # of which no byte is zero
    spans = plain_spans((6000,), 0, (1,))._replace(seqused=torch.zeros(1, dtype=torch.int32))
    (q, k, v), (grad_q, grad_k, grad_v) = qkv.unbind(1), grads.unbind(1)
    BACKEND.backward((grad_q, grad_k, grad_v), q, q, k, v, q, torch.ones(2, 6000), spans, spans, 0.2, True)
    assert (grads == 0.1).all()


@needs_library
def test_gradients_go_into_memory_of_any_strides() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(40, 3, 2, 32).unbind(1)
    queries, keys = plain_spans((10, 30)), plain_spans((7, 31), 1, (7, 31))
    grad_out = torch.randn(40, 2, 32)
    out, lse = BACKEND.forward(q, k, v, queries, keys, SCALE)

    def written(*grads: Tensor) -> list[Tensor]:
        for grad in grads:
            grad.fill_(7)
        BACKEND.backward((grads[0], grads[1], grads[2]), grad_out, q, k, v, out, lse, queries, keys, SCALE, True)
        return [grad.contiguous() for grad in grads]

    packed = torch.empty(40, 3, 2, 32)
    expected = written(*packed.unbind(1))
    assert (expected[1][[7, 39]] == 7).all()
    assert (expected[1] == 7).sum() == 2 * 64
    turned = torch.empty(3, 32, 2, 40).permute(0, 3, 2, 1)
    spread = torch.empty(40, 2, 3, 32).unbind(2)
    for grads in ([torch.empty(40, 2, 32) for _ in range(3)], turned, spread, (turned[0], packed[:, 1], turned[2])):
        for got, right in zip(written(*grads), expected, strict=True):
            assert torch.equal(got, right)


class Ops(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(op.name())
        return op(*args, **(kwargs or {}))


@needs_library
def test_nothing_is_copied() -> None:
    """Slots of packed tensors are read and written where they lie, from any row on."""
    torch.use_deterministic_algorithms(False)  # no memory is filled
    qkv, kv = torch.randn(30, 3, 2, 32), torch.randn(50, 2, 2, 32)
    spans = plain_spans((10, 20))
    for q, k, v, keys in ((*qkv.unbind(1), spans), (qkv[:, 0], *kv[1:].unbind(1), plain_spans((9, 39), 1, (9, 39)))):
        grad_q, grad_kv = torch.empty(30, 3, 2, 32)[:, 0], torch.empty(k.shape[0], 2, 2, 32)
        grads = grad_q, grad_kv[:, 0], grad_kv[:, 1]
        with Ops() as ops:
            out, lse = BACKEND.forward(q, k, v, spans, keys, SCALE)
            BACKEND.backward(grads, out, q, k, v, out, lse, spans, keys, SCALE, True)
        assert ops.names == {"aten::empty.memory_format"}


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
    qkv = random_qkv(layout, "scan", 16, dtype)
    spans = plain_spans(layout.seqlens("scan").tolist(), 2)
    rest = flat_attention(spans, 0.25, "native", False, "scan")
    torch.library.opcheck(torch.ops.hlip_kernels.hier_attention.default, (qkv.clone().requires_grad_(), *rest))
    out, lse = torch.ops.hlip_kernels.hier_attention(qkv, *rest)
    arguments = (torch.ones_like(out), qkv, out, lse, *rest)
    torch.library.opcheck(torch.ops.hlip_kernels.hier_attention_backward.default, arguments)
