"""The native backend: every instruction set that this processor has, against the reference in float64."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import emulation
from conftest import use_native
from hlip_kernels import StudyLayout, available_backends, hier_attention
from hlip_kernels import native as library
from hlip_kernels.attention import flat_attention
from hlip_kernels.backends import BACKENDS, choose_backend
from hlip_kernels.backends.base import AttentionBackend, Spans
from hlip_kernels.native import ISAS, native
from spans import SCALE, check_few_queries, plain_spans
from test_attention import RAGGED, out_and_grad, random_qkv

ROOT = Path(__file__).parents[1]
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


def results(
    way: AttentionBackend, qkv: Tensor, lengths: Sequence[int], num_prefix: int, scale: float
) -> tuple[Tensor, ...]:
    """out, lse, and the gradient of qkv."""
    spans = plain_spans(lengths, num_prefix)
    grad_out = torch.randn(qkv.shape[0], *qkv.shape[2:], generator=torch.Generator().manual_seed(1)).to(qkv.dtype)
    out, lse = forward(way, qkv, spans, scale)
    return out, lse, backward(way, grad_out, qkv, out, lse, spans, scale)


def check(
    lengths: Sequence[int], num_prefix: int, heads: int, head_dim: int, dtype: torch.dtype, spread: float = 1,
    num_orders: int = 1, num_keys: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """The largest error is at most twice that of eager PyTorch in the dtype, of gradients three times, in norm twice;
    `spread` widens scores. Rows attend to `num_keys` others, if given, and otherwise to one another.

    A long sum is off by chance in one element, and eager PyTorch as far in another order of the head's columns: errors
    are root mean squares over `num_orders` orders, as what is wrong is wrong in each.
    """
    torch.manual_seed(0)
    rows = len(lengths) * num_prefix + sum(lengths)
    qkv = torch.randn(rows, 3, heads, head_dim)
    qkv[:, 0] *= spread
    qkv = qkv.to(dtype)
    grad_out = torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    spans, scale = plain_spans(lengths, num_prefix), head_dim**-0.5
    if not rows:
        out, lse, grad = results(BACKEND, qkv, lengths, num_prefix, scale)
        assert (out.shape, lse.shape, grad.shape) == ((0, heads, head_dim), (heads, 0), qkv.shape)
        return

    sources, keys = [qkv], spans
    if num_keys is not None:
        sources, keys = [qkv[:, :1], torch.randn(sum(num_keys), 2, heads, head_dim).to(dtype)], plain_spans(num_keys)

    def slots(of: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return of[0][:, 0], of[-1][:, -2], of[-1][:, -1]

    def found(way: AttentionBackend, order: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        *own, g = (x.to(dtype)[..., order] for x in (*sources, grad_out))
        out, lse = way.forward(*slots(own), spans, keys, scale)
        grads = [torch.full_like(x, torch.nan) for x in own]
        way.backward(slots(grads), g, *slots(own), out, lse, spans, keys, scale, True)
        back = order.argsort()
        grad = torch.cat([x.flatten(0, 1) for x in grads])
        return out[..., back].double(), lse.double(), grad[..., back].double()

    orders = [torch.arange(head_dim), *(torch.randperm(head_dim) for _ in range(num_orders - 1))]
    exact = found(REFERENCE, orders[0], torch.float64)
    errors, eager_errors = (
        [
            torch.stack([torch.where(got == expected, 0, got - expected) for got in in_orders]).square().mean(0).sqrt()
            for in_orders, expected in zip(
                zip(*(found(way, order, dtype) for order in orders), strict=True), exact, strict=True
            )
        ]
        for way in (BACKEND, REFERENCE)
    )
    rounding = torch.finfo(dtype).eps / 2
    for part, factor in ((0, 2), (2, 3)):
        error, eager = errors[part], eager_errors[part]
        assert error.max() <= factor * eager.max() + rounding * exact[part].abs().max()
        assert error.norm() <= 2 * eager.norm() + rounding * exact[part].norm()
    assert errors[1].max() <= 2 * eager_errors[1].max() + (1e-4 if dtype == torch.bfloat16 else 1e-6)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prefix", [0, 1, 5, 32])
def test_lengths(isa: str, num_prefix: int, dtype: torch.dtype) -> None:
    check((0, 1, 15, 16, 17, 63, 64, 65, 0, 128, 197, 260), num_prefix, 2, 64, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 112, 128])
def test_head_dims(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    check((70, 33), 1, 3, head_dim, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_that_all_threads_share(isa: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    if isa in EMULATED:
        check((300, 3), 1, 20, 128, dtype)
    else:
        check((1200, 3), 1, 12, 64, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [8, 200])
def test_scores_of_any_size(isa: str, spread: float, dtype: torch.dtype) -> None:
    """Weights that overflow without the maximum taken off, and rows whose weights all vanish without it."""
    check((100, 300), 1, 2, 64, dtype, spread)
    check((3, 150, 40), 0, 2, 64, dtype, spread, num_orders=8, num_keys=(150, 3, 40))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_shows_and_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    qkv = torch.randn(100, 3, 2, 32).to(dtype)
    qkv[3, 0, 1, 5] = torch.nan
    out, lse = forward(BACKEND, qkv, plain_spans((50, 50)), 0.2)
    assert out[3, 1].isnan().all()
    assert lse[1, 3].isnan()
    assert out.isnan().sum() == 32


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_scores_stay_in_their_row(isa: str, dtype: torch.dtype) -> None:
    """In row 3 the scores of the second block of keys are infinite but for the first, which is inf * 0."""
    torch.manual_seed(0)
    qkv = torch.randn(128, 3, 1, 32)
    qkv[:, 0, 0, 0], qkv[:65, 1, 0, 0], qkv[65:, 1, 0, 0] = 0, 0, 1
    expected, expected_lse = forward(BACKEND, qkv.to(dtype), plain_spans((128,)), 0.2)
    qkv[3, 0, 0, 0] = torch.inf
    out, lse = forward(BACKEND, qkv.to(dtype), plain_spans((128,)), 0.2)
    others = torch.arange(128) != 3
    assert out[3].isnan().all()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out[others], expected[others], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse[:, others], expected_lse[:, others], rtol=tolerance, atol=tolerance)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.2, -0.2])
@pytest.mark.parametrize("spread", [1, 50])
def test_keys_whose_scores_are_less_than_any_number_weigh_nothing(
    isa: str, spread: float, scale: float, dtype: torch.dtype
) -> None:
    """All of the first blocks. The others' scores may do without their maximum, or not."""
    torch.manual_seed(0)
    qkv = torch.randn(200, 3, 2, 32)
    qkv[:, 0] *= spread
    qkv[:, 0, :, 0], qkv[:128, 1, :, 0], qkv[128:, 1, :, 0] = 1e30, -1e30 if scale > 0 else 1e30, 0
    qkv = qkv.to(dtype)
    check_results(qkv, (200,), scale)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, -1.0])
@pytest.mark.parametrize("size", [1e3, 1e5, 5e6, 1e8, 1e20])
def test_gradients_of_enormous_scores(isa: str, size: float, scale: float, dtype: torch.dtype) -> None:
    """Two keys differ where queries are zero, so that few weights are 1, and some rows have small scores: weights are
    shares, whatever lse is rounded to. A group is longer than any block, and one has a single key."""
    torch.manual_seed(0)
    lengths, head_dim = (300, 1, 34), 32
    qkv = torch.randn(sum(lengths), 3, 2, head_dim)
    qkv[:, 0, :, 16:] = 0
    qkv[1::2, 1, :, :16] = qkv[:-1:2, 1, :, :16]
    qkv[:, :2] *= (size * head_dim**-0.5) ** 0.5
    qkv[::5, 0] /= size
    qkv = qkv.to(dtype)
    check_results(qkv, lengths, scale)


def check_results(qkv: Tensor, lengths: Sequence[int], scale: float) -> None:
    """The largest error is at most twice that of eager PyTorch, of each gradient three times, plus one rounding."""
    got, eager, exact = (
        results(way, x, lengths, 0, scale) for way, x in ((BACKEND, qkv), (REFERENCE, qkv), (REFERENCE, qkv.double()))
    )
    rounding = torch.finfo(qkv.dtype).eps / 2
    of_queries_and_keys = exact[2][:, :2].abs().max()  # those of queries cancel out
    for factor, largest, *values in (
        (2, exact[0].abs().max(), *(x[0] for x in (got, eager, exact))),
        (3, of_queries_and_keys, *(x[2][:, 0] for x in (got, eager, exact))),
        (3, of_queries_and_keys, *(x[2][:, 1] for x in (got, eager, exact))),
        (3, exact[2][:, 2].abs().max(), *(x[2][:, 2] for x in (got, eager, exact))),
    ):
        error, eager_error = (float((value.double() - values[-1]).abs().max()) for value in values[:-1])
        assert error <= factor * eager_error + rounding * float(largest)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_below_zero(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = (8 * torch.randn(130, 3, 2, 32)).to(dtype)
    flipped = qkv.clone()
    flipped[:, 0] *= -1
    below, above = (results(BACKEND, x, (130,), 0, scale) for x, scale in ((qkv, -0.2), (flipped, 0.2)))
    for got, expected in zip(below[:2], above[:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@needs_library
@pytest.mark.parametrize("offset", [-3072.0, 3072.0])
def test_scores_far_from_zero(isa: str, offset: float) -> None:
    """A row's softmax is that of its scores less any number."""
    torch.manual_seed(0)
    qkv = torch.randn(90, 3, 2, 32)
    qkv[:, 0, :, 0], qkv[:, 1, :, 0] = 64, 0
    shifted = qkv.clone()
    shifted[:, 1, :, 0] = offset / 64
    for dtype in DTYPES:
        near, far = (results(BACKEND, x.to(dtype), (90,), 0, 1.0) for x in (qkv, shifted))
        exact = results(REFERENCE, qkv.to(dtype).double(), (90,), 0, 1.0)
        assert far[0].isfinite().all()
        assert far[2].isfinite().all()
        slack = 0.02 if dtype == torch.bfloat16 else 2e-3  # the sums round at the size of the offset
        torch.testing.assert_close(far[0].double(), exact[0], atol=slack, rtol=0)
        torch.testing.assert_close(far[1].double() - offset, near[1].double(), atol=slack, rtol=0)


@needs_library
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    num_prefix=st.integers(0, 32),
    head_dim=st.integers(1, 8).map(lambda n: 16 * n),
    heads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(HERE + EMULATED or ("none",)),
    threads=st.integers(1, 3),
)
def test_any_layout(
    lengths: list[int], num_prefix: int, head_dim: int, heads: int, dtype: torch.dtype, isa: str, threads: int,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    assume(1 not in [n + num_prefix for n in lengths])  # eager PyTorch makes no error there: see the next test
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        emulated = isa in EMULATED
        use_native(patch, request.getfixturevalue("emulated_native") if emulated else native()._replace(isa=isa))
        check(lengths, num_prefix, heads, head_dim, dtype, num_orders=4)


LENGTHS = st.integers(0, 150)


@needs_library
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS.filter(lambda n: n != 1)), max_size=5),  # see above
    head_dim=st.integers(1, 8).map(lambda n: 16 * n),
    heads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(HERE + EMULATED or ("none",)),
    threads=st.integers(1, 3),
)
def test_any_queries_and_keys(
    lengths: list[tuple[int, int]], head_dim: int, heads: int, dtype: torch.dtype, isa: str, threads: int,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    num_queries, num_keys = zip((40, 40), *lengths, strict=True)
    with pytest.MonkeyPatch.context() as patch:
        emulated = isa in EMULATED
        use_native(patch, request.getfixturevalue("emulated_native") if emulated else native()._replace(isa=isa))
        check(num_queries, 0, heads, head_dim, dtype, num_orders=4, num_keys=num_keys)


@needs_library
def test_one_key_has_no_gradient(isa: str) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(20, 3, 2, 64)
    out, lse, grad = results(BACKEND, qkv, [1] * 20, 0, 0.125)
    assert torch.equal(out, qkv[:, 2])
    assert torch.equal(grad[:, :2], torch.zeros_like(grad[:, :2]))
    torch.testing.assert_close(lse, (qkv[:, 0] * qkv[:, 1]).sum(-1).T * 0.125)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_any_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths, heads, head_dim = (800, 40, 197, 300), 14, 64  # of which the first is shared
    if isa in EMULATED:
        lengths, heads, head_dim = (300, 40), 20, 128
    qkv = torch.randn(sum(lengths) + len(lengths), 3, heads, head_dim).to(dtype)
    found = []
    for threads in (1, 2, 5, 1):
        torch.set_num_threads(threads)
        found.append(results(BACKEND, qkv, lengths, 1, 0.125))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_alone_has_the_same_bits(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = (300, 20, 130)
    qkv = torch.randn(sum(lengths), 3, 2, 48).to(dtype)
    grads = torch.randn(sum(lengths), 2, 48).to(dtype)
    spans = plain_spans(lengths)
    out, lse = forward(BACKEND, qkv, spans, 0.2)
    grad = backward(BACKEND, grads, qkv, out, lse, spans, 0.2)
    for part in (slice(0, 300), slice(300, 320), slice(320, 450)):
        alone = plain_spans((part.stop - part.start,))
        own_out, own_lse = forward(BACKEND, qkv[part], alone, 0.2)
        assert torch.equal(own_out, out[part])
        assert torch.equal(own_lse, lse[:, part])
        assert torch.equal(backward(BACKEND, grads[part], qkv[part], own_out, own_lse, alone, 0.2), grad[part])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_in_any_order(isa: str, dtype: torch.dtype) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
    qkv = random_qkv(layout, "scan", 16, dtype)
    shifted = torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view(qkv.shape)  # aligned to one element only
    for other in (qkv.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1), shifted):
        for got, expected in zip(
            out_and_grad(other, layout, "scan", "native"), out_and_grad(qkv, layout, "scan", "native"), strict=True
        ):
            assert torch.equal(got, expected)


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


@needs_library
@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float16, 64, "needs bfloat16 or float32, got float16"),
        (torch.float64, 64, "needs bfloat16 or float32, got float64"),
        (torch.float32, 24, "needs a head dim that is a multiple of 16 and at most 128, got 24"),
        (torch.float32, 144, "needs a head dim that is a multiple of 16 and at most 128, got 144"),
    ],
)
def test_refuses(dtype: torch.dtype, head_dim: int, message: str) -> None:
    layout = StudyLayout.from_grids(RAGGED)
    qkv = random_qkv(layout, "scan", head_dim, dtype)
    with pytest.raises(ValueError, match=message):
        hier_attention(qkv, layout, "scan", backend="native")
    assert available_backends("cpu", dtype, head_dim)[0] == "cpu"


@needs_library
def test_auto_leaves_code_for_any_processor_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    use_native(monkeypatch, native()._replace(isa=ISAS[-1]))
    assert available_backends()[:2] == ["native", "cpu"]
    use_native(monkeypatch, native()._replace(isa="scalar"))
    assert available_backends()[0] == "cpu"
    assert "native" in available_backends()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "missing.so")
    missing = library.native.__wrapped__()
    monkeypatch.setattr(library, "native", lambda: missing)
    choose_backend.cache_clear()
    assert "native" not in available_backends()
    assert choose_backend("auto", "cpu", torch.float32, 64) == "cpu"
    with pytest.raises(ValueError, match="the native library is not built"):
        choose_backend("native", "cpu", torch.float32, 64)
    choose_backend.cache_clear()


def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "PATH", tmp_path / "broken.so")
    assert "cannot be loaded" in library.native.__wrapped__().reason


@needs_library
def test_an_isa_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLIP_NATIVE_ISA", "scalar")
    assert library.native.__wrapped__().isa == "scalar"
    monkeypatch.setenv("HLIP_NATIVE_ISA", "neon")
    with pytest.raises(ValueError, match=r"this processor has scalar.*got 'neon'"):
        library.native.__wrapped__()


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_openmp_runtime() -> None:
    """In a process of its own, as other packages of the tests bring theirs."""
    program = f"""
import re, torch
from hlip_kernels import StudyLayout, hier_attention
hier_attention(torch.zeros(34, 3, 2, 16), StudyLayout.from_grids({RAGGED}), "scan", backend="native")
print(len(set(re.findall(r"\\S*/lib[gi]?omp\\S*", open("/proc/self/maps").read()))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "1"


SANITIZERS = ("-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The library with AddressSanitizer and UndefinedBehaviorSanitizer, built by setup.py, run without Python."""
    flags = " ".join(SANITIZERS)
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "obj"]
    env = {**os.environ, "CXXFLAGS": flags, "LDFLAGS": flags}
    subprocess.run(build, cwd=ROOT, env=env, check=True, capture_output=True)
    (built,) = (tmp_path / "lib").rglob("*.so")
    run_sanitized(tmp_path, built, range(len(HERE)))


@pytest.mark.slow
@pytest.mark.skipif(bool(emulation.WHY_NOT), reason=emulation.WHY_NOT)
def test_sanitizers_find_nothing_on_an_emulated_processor(tmp_path: Path) -> None:
    """There they also see what instructions read and write."""
    built = emulation.sanitized(tmp_path / "lib", SANITIZERS)
    run_sanitized(tmp_path, built, [ISAS.index("amx")], "last")


def run_sanitized(folder: Path, built: Path, isas: Sequence[int], *arguments: str) -> None:
    assert b"__asan" in built.read_bytes()
    driver = build_driver(folder, *SANITIZERS)
    # the OpenMP runtime keeps its threads' memory to the end
    run = subprocess.run(
        [driver, built, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for isa in isas:
        for what in ("attention", "norm", "gradient of norm", "gelu"):
            assert f"isa {isa}, {what}" in run.stdout
    if ISAS.index("amx") in isas:
        for what in ("product", "transposed product", "two layers", "gradient of weight"):
            assert f"isa {ISAS.index('amx')}, {what}" in run.stdout


def build_driver(folder: Path, *flags: str) -> Path:
    """native_driver.cpp, linked to the OpenMP runtime that the library looks for."""
    source, driver = ROOT / "tests/native_driver.cpp", folder / "driver"
    link = ["-Wl,--no-as-needed", "-ldl"]
    subprocess.run(["g++", "-std=c++17", "-fopenmp", *flags, source, "-o", driver, *link], check=True)
    return driver


@needs_library
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("processor", "isas"), [("Nehalem", 1), ("Haswell", 2)])
def test_on_an_older_processor(processor: str, isas: int, tmp_path: Path) -> None:
    """Emulated: any instruction that the processor lacks ends the program."""
    command = ["qemu-x86_64", "-cpu", processor, build_driver(tmp_path, "-O1"), library.PATH, "small"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = {line.split(",")[0] for line in run.stdout.splitlines()}
    assert found == {f"isa {isa}" for isa in range(isas)}
