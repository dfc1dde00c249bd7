"""hier_attention: the reference against the textbook, the other backends against the reference in float64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_cases import BACKENDS, DTYPES, HEADS, RAGGED, nan_filled_memory, random_qkv  # noqa: F401
from conftest import token_labels
from hlip_kernels import Grid, Level, StudyLayout, hier_attention
from hlip_kernels.attention import flat_attention
from hlip_kernels.backends.base import Spans
from spans import plain_spans

forward_op = torch.ops.hlip_kernels.hier_attention.default
backward_op = torch.ops.hlip_kernels.hier_attention_backward.default
DEPTH: dict[Level, int] = {"study": 1, "scan": 2, "slice": 3}  # how much of a label names a group
LENGTHS = (1, 15, 63, 64, 65, 197)


def group_rows(grids: list[list[Grid]], level: Level, num_prefix: int) -> dict[tuple[int, ...], list[int]]:
    """For each group, by name: its prefix rows and its patch rows, which lie one after another."""
    labels = [label[: DEPTH[level]] for label in token_labels(grids)]
    rows, first = {}, 0
    for name in sorted(set(labels)):
        last = first + num_prefix + labels.count(name)
        rows[name] = list(range(first, last))
        first = last
    return rows


def settings(spans: Spans, backend: str, deterministic: bool = False) -> tuple[object, ...]:
    """What the ops take after their tensors."""
    return flat_attention(spans, 0.25, backend, deterministic, "scan")


def textbook(qkv: Tensor, groups: list[list[int]], scale: float) -> Tensor:
    """softmax(q k^T * scale) v within each group of rows."""
    order = [row for rows in groups for row in rows]
    assert sorted(order) == list(range(len(qkv)))
    outs = []
    for rows in groups:
        q, k, v = qkv[rows].unbind(1)
        weights = torch.exp(torch.einsum("ihd,jhd->hij", q, k) * scale)
        outs.append(torch.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdim=True), v))
    return torch.cat(outs)[torch.tensor(order, dtype=torch.int64).argsort()]


def layout_of(lengths: tuple[int, ...], level: Level, num_prefix: int) -> StudyLayout:
    """The groups of `level` have these lengths, and differ from those of the finer levels."""
    if level == "slice":
        return StudyLayout.from_grids([[(1, 1, n) for n in lengths]], num_prefix)
    if level == "scan":
        return StudyLayout.from_grids([[(n, 1, 1) for n in lengths]], num_prefix)
    return StudyLayout.from_grids([[(n // 2 or 1, 1, 1), (1, 1, n - n // 2)][: min(n, 2)] for n in lengths], num_prefix)


def out_and_grad(qkv: Tensor, layout: StudyLayout, level: Level, backend: str) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = hier_attention(qkv, layout, level, backend=backend)
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, qkv, grad_out)[0]


def assert_like_eager(got: Tensor, eager: Tensor, exact: Tensor, factor: int) -> None:
    """The error is at most `factor` times that of eager PyTorch in the same dtype, plus one rounding."""
    assert got.dtype == eager.dtype
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs().max()
    error, eager_error = (got.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    assert error <= factor * eager_error + rounding, f"error {error:.3g}, eager {eager_error:.3g}"


def check_against_float64(qkv: Tensor, layout: StudyLayout, level: Level, backend: str) -> None:
    exact = out_and_grad(qkv.double(), layout, level, "reference")
    eager = out_and_grad(qkv, layout, level, "reference")
    got = out_and_grad(qkv, layout, level, backend)
    assert got[0].shape == (qkv.shape[0], *qkv.shape[2:])
    assert_like_eager(got[0], eager[0], exact[0], factor=2)
    assert_like_eager(got[1], eager[1], exact[1], factor=3)


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 32])
@pytest.mark.parametrize("level", DEPTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_like_the_textbook(backend: str, level: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    qkv = random_qkv(layout, level, 16).requires_grad_()
    groups = list(group_rows(RAGGED, level, num_prefix).values())
    expected = textbook(qkv, groups, 0.25)
    out, grad = out_and_grad(qkv, layout, level, backend)
    torch.testing.assert_close(out, expected)
    torch.manual_seed(1)
    expected_grad = torch.autograd.grad(expected, qkv, torch.randn_like(expected))[0]
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 32])
@pytest.mark.parametrize("level", DEPTH)
def test_cpu_error(level: Level, num_prefix: int, dtype: torch.dtype) -> None:
    layout = layout_of(LENGTHS, level, num_prefix)
    assert layout.seqlens(level).tolist() == list(LENGTHS)
    check_against_float64(random_qkv(layout, level, 32, dtype), layout, level, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_error_long(dtype: torch.dtype) -> None:
    layout = layout_of((1177, 64), "study", num_prefix=1)
    check_against_float64(random_qkv(layout, "study", 64, dtype), layout, "study", "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80])
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    layout = layout_of((65, 15), "scan", num_prefix=1)
    check_against_float64(random_qkv(layout, "scan", head_dim, dtype), layout, "scan", "cpu")


@pytest.mark.parametrize("scale", [0.125, 0.3, 2.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_softmax_scale(backend: str, scale: float) -> None:
    layout = StudyLayout.from_grids(RAGGED)
    qkv = random_qkv(layout, "scan", 16).requires_grad_()
    out = hier_attention(qkv, layout, "scan", scale, backend)
    expected = textbook(qkv, list(group_rows(RAGGED, "scan", 1).values()), scale)
    torch.testing.assert_close(out, expected)
    grad_out = torch.randn_like(out)
    grads = (torch.autograd.grad(o, qkv, grad_out)[0] for o in (out, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_scale(backend: str) -> None:
    layout = StudyLayout.from_grids(RAGGED)
    qkv = random_qkv(layout, "scan", 64)
    by_default, given = (hier_attention(qkv, layout, "scan", scale, backend) for scale in (None, 0.125))
    assert torch.equal(by_default, given)


@pytest.mark.parametrize("num_prefix", [0, 1])
@pytest.mark.parametrize("lengths", [(0, 3, 0, 0, 5, 0), (2, 0), (0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_length_zero(backend: str, lengths: tuple[int, ...], num_prefix: int) -> None:
    torch.manual_seed(0)
    bounds = list(accumulate((num_prefix + n for n in lengths), initial=0))
    groups = [list(range(a, b)) for a, b in pairwise(bounds)]
    qkv = torch.randn(bounds[-1], 3, HEADS, 16, dtype=torch.float64, requires_grad=True)
    out, lse = forward_op(qkv, *settings(plain_spans(lengths, num_prefix), backend))
    expected = textbook(qkv, groups, 0.25)
    torch.testing.assert_close(out, expected)
    assert lse.isfinite().all()
    grad_out = torch.randn_like(out)
    grads = (torch.autograd.grad(o, qkv, grad_out)[0] for o in (out, expected))
    torch.testing.assert_close(*grads)


def strided(qkv: Tensor) -> Tensor:
    """The same numbers, laid out (H, D, 3, rows) in memory."""
    return qkv.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


@pytest.mark.parametrize("level", DEPTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str, level: Level) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
    qkv = random_qkv(layout, level, 16)
    padded = torch.cat([qkv, qkv], dim=-1)[..., :16]
    for other in (strided(qkv), padded):
        assert not other.is_contiguous()
        for got, expected in zip(
            out_and_grad(other, layout, level, backend), out_and_grad(qkv, layout, level, backend), strict=True
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_grad_out(backend: str) -> None:
    layout = StudyLayout.from_grids(RAGGED)
    qkv = random_qkv(layout, "scan", 16).requires_grad_()
    out = hier_attention(qkv, layout, "scan", backend=backend)
    (expected,) = torch.autograd.grad(out, qkv, torch.ones_like(out), retain_graph=True)
    (got,) = torch.autograd.grad(out.sum(), qkv)  # ones, with strides of 0
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("level", DEPTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, level: Level, num_prefix: int) -> None:
    layout = StudyLayout.from_grids([[(2, 1, 2), (1, 1, 1)], [(1, 1, 3)]], num_prefix)
    qkv = random_qkv(layout, level, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hier_attention(x, layout, level, backend=backend), qkv)


@pytest.mark.parametrize("memory", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, dtype: torch.dtype, memory: str) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
    qkv = random_qkv(layout, "scan", 16, dtype)
    if memory == "strided":
        qkv = strided(qkv)
    rest = settings(plain_spans(layout.seqlens("scan").tolist(), 2), backend)
    torch.library.opcheck(forward_op, (qkv.clone().requires_grad_(), *rest))
    out, lse = forward_op(qkv, *rest)
    torch.library.opcheck(backward_op, (torch.ones_like(out), qkv, out, lse, *rest))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", DEPTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend: str, level: Level, dtype: torch.dtype) -> None:
    with FakeTensorMode():
        layout = StudyLayout.from_grids(RAGGED, num_prefix=2)
        rows = layout.num_groups(level) * 2 + layout.num_tokens
        qkv = torch.empty(rows, 3, HEADS, 16, dtype=dtype, requires_grad=True)
        out = hier_attention(qkv, layout, level, backend=backend)
        assert (out.shape, out.dtype) == ((rows, HEADS, 16), dtype)
        out.sum().backward()
        assert qkv.grad is not None
        assert (qkv.grad.shape, qkv.grad.dtype) == (qkv.shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_tensors_of_another_device(dtype: torch.dtype) -> None:
    """The path of a GPU where there is none: the backward op by itself, autograd needs the real device."""
    with FakeTensorMode():
        layout = StudyLayout.from_grids(RAGGED).to("cuda:0")
        qkv = torch.empty(34, 3, HEADS, 16, dtype=dtype, device="cuda:0")
        assert hier_attention(qkv, layout, "scan").device == qkv.device
        spans = Spans(layout.cu_seqlens("scan"), layout.tiles("scan"), layout.max_seqlen("scan"))
        out, lse = forward_op(qkv, *settings(spans, "reference"))
        grad = backward_op(torch.empty_like(out), qkv, out, lse, *settings(spans, "reference"))
        assert (out.shape, lse.shape, grad.shape) == ((34, HEADS, 16), (HEADS, 34), qkv.shape)
        assert {out.device, lse.device, grad.device} == {qkv.device}
        assert (out.dtype, lse.dtype, grad.dtype) == (dtype, torch.float32, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("level", DEPTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_study_alone_is_the_same_study_in_a_batch(backend: str, level: Level, dtype: torch.dtype) -> None:
    grids: list[list[Grid]] = [[(2, 5, 8), (3, 7, 7)], [(4, 4, 4)], [(2, 5, 8), (1, 1, 1)], [(5, 13, 1), (2, 8, 8)]]
    layout = StudyLayout.from_grids(grids, num_prefix=2)
    qkv = random_qkv(layout, level, 32, dtype).requires_grad_()
    out = hier_attention(qkv, layout, level, backend=backend)
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    for s, study in enumerate(grids):
        own = [row for name, rows in group_rows(grids, level, 2).items() if name[0] == s for row in rows]
        alone = qkv[own].detach().requires_grad_()
        out_alone = hier_attention(alone, StudyLayout.from_grids([study], num_prefix=2), level, backend=backend)
        (grad_alone,) = torch.autograd.grad(out_alone, alone, grad_out[own])
        assert torch.equal(out_alone, out[own])
        assert torch.equal(grad_alone, grad[own])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", DEPTH)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_bitwise(backend: str, level: Level, dtype: torch.dtype) -> None:
    assert torch.empty(1).isnan(), "memory is not NaN-filled: rows nobody writes would go unseen"
    layout = layout_of((65, 64, 65, 15, 1), level, num_prefix=1)
    qkv = random_qkv(layout, level, 32, dtype)
    first, second = (out_and_grad(qkv, layout, level, backend) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
