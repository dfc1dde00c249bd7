"""The native backend: every instruction set that this processor has, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import use_native
from hlip_kernels import StudyLayout
from hlip_kernels.backends.base import AttentionBackend
from hlip_kernels.native import native
from native_cases import (  # noqa: F401
    BACKEND,
    DTYPES,
    EMULATED,
    HERE,
    REFERENCE,
    backward,
    forward,
    isa,
    nan_filled_memory,
    needs_library,
    same_threads,
)
from spans import plain_spans
from test_attention import RAGGED, out_and_grad, random_qkv


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
    are root mean squares over `num_orders` orders, and the largest one over as many draws of the values.
    """
    if not len(lengths) * num_prefix + sum(lengths):
        empty = torch.zeros(0, 3, heads, head_dim, dtype=dtype)
        out, lse, grad = results(BACKEND, empty, lengths, num_prefix, head_dim**-0.5)
        assert (out.shape, lse.shape, grad.shape) == ((0, heads, head_dim), (heads, 0), empty.shape)
        return
    draws = [draw_errors(seed, lengths, num_prefix, heads, head_dim, dtype, spread, num_orders, num_keys)
             for seed in range(num_orders)]  # fmt: skip

    def largest(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([x.abs().max() for x in tensors]).square().mean().sqrt()

    def norm(tensors: Iterable[Tensor]) -> Tensor:
        return torch.stack([x.norm() for x in tensors]).norm()

    rounding = torch.finfo(dtype).eps / 2
    (out, *outs), (_, *lses), (grad, *grads) = (tuple(zip(*part, strict=True)) for part in zip(*draws, strict=True))
    for exact, (ours, eager), factor in ((out, outs, 2), (grad, grads, 3)):
        assert largest(ours) <= factor * largest(eager) + rounding * largest(exact)
        assert norm(ours) <= 2 * norm(eager) + rounding * norm(exact)
    ours, eager = lses
    assert largest(ours) <= 2 * largest(eager) + (1e-4 if dtype == torch.bfloat16 else 1e-6)


def draw_errors(
    seed: int, lengths: Sequence[int], num_prefix: int, heads: int, head_dim: int, dtype: torch.dtype, spread: float,
    num_orders: int, num_keys: Sequence[int] | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Outputs, logsumexp and gradients of one draw of values: exact ones, and the errors of the native backend and of
    eager PyTorch, root mean squares over the orders."""
    torch.manual_seed(2 * seed)
    rows = len(lengths) * num_prefix + sum(lengths)
    qkv = torch.randn(rows, 3, heads, head_dim)
    qkv[:, 0] *= spread
    qkv = qkv.to(dtype)
    grad_out = torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(2 * seed + 1)).to(dtype)
    spans, scale = plain_spans(lengths, num_prefix), head_dim**-0.5
    sources, keys = [qkv], spans
    if num_keys is not None:
        sources, keys = [qkv[:, :1], torch.randn(sum(num_keys), 2, heads, head_dim).to(dtype)], plain_spans(num_keys)

    def slots(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return tensors[0][:, 0], tensors[-1][:, -2], tensors[-1][:, -1]

    def run(way: AttentionBackend, order: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        *own, g = (x.to(dtype)[..., order] for x in (*sources, grad_out))
        out, lse = way.forward(*slots(own), spans, keys, scale)
        grads = [torch.full_like(x, torch.nan) for x in own]
        way.backward(slots(grads), g, *slots(own), out, lse, spans, keys, scale, True)
        back = order.argsort()
        grad = torch.cat([x.flatten(0, 1) for x in grads])
        return out[..., back].double(), lse.double(), grad[..., back].double()

    def errors(way: AttentionBackend) -> list[Tensor]:
        by_order = [run(way, order, dtype) for order in orders]
        return [
            torch.stack([torch.where(x == exact, 0, x - exact) for x in results]).square().mean(0).sqrt()
            for exact, results in zip(expected, zip(*by_order, strict=True), strict=True)
        ]

    orders = [torch.arange(head_dim), *(torch.randperm(head_dim) for _ in range(num_orders - 1))]
    expected = run(REFERENCE, orders[0], torch.float64)
    return list(zip(expected, errors(BACKEND), errors(REFERENCE), strict=True))


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
