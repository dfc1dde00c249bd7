"""hier_attention: the reference against the textbook, the other backends against the reference in float64."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from conftest import token_labels
from hlip_kernels import Grid, Level, StudyLayout, add_regroup_norm, available_backends, hier_attention, ops
from hlip_kernels.attention import flat_attention
from hlip_kernels.backends import BACKENDS as ALL_BACKENDS
from hlip_kernels.backends import choose_backend
from hlip_kernels.backends.base import AttentionBackend, NormBackend, Spans
from hlip_kernels.layout import LEVELS
from spans import check_few_queries, plain_spans

forward_op = torch.ops.hlip_kernels.hier_attention.default
backward_op = torch.ops.hlip_kernels.hier_attention_backward.default

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEPTH: dict[Level, int] = {"study": 1, "scan": 2, "slice": 3}  # how much of a label names a group
LENGTHS = (1, 15, 63, 64, 65, 197)
HEADS = 2
RAGGED: list[list[Grid]] = [[(2, 2, 3), (3, 1, 1)], [(1, 4, 2)], [(1, 1, 1), (5, 1, 1)]]


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """`torch.empty` is filled with NaN: a row that nobody writes shows up in every comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


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


def random_qkv(layout: StudyLayout, level: Level, head_dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    rows = layout.num_groups(level) * layout.num_prefix + layout.num_tokens
    return torch.randn(rows, 3, HEADS, head_dim, dtype=torch.float64).to(dtype)


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


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (33, 3, 2, 8),
            torch.float32,
            r"expected 34 rows at level 'scan' \(5 groups x 1 prefix \+ 29 patches\), got 33",
        ),
        ((29, 3, 2, 8), torch.float32, "expected 34 rows"),
        ((34, 3, 16), torch.float32, r"expected a floating-point tensor \(rows, 3, heads, head_dim\)"),
        ((1, 34, 3, 2, 8), torch.float32, r"got \(1, 34, 3, 2, 8\)"),
        ((34, 2, 3, 8), torch.float32, r"got \(34, 2, 3, 8\)"),
        ((34, 3, 2, 8), torch.int64, "got .* torch.int64"),
        ((34, 3, 2, 8), torch.float8_e4m3fn, "got .* torch.float8_e4m3fn"),
        ((34, 3, 0, 8), torch.float32, r"got \(34, 3, 0, 8\)"),
        ((34, 3, 2, 0), torch.float32, r"got \(34, 3, 2, 0\)"),
    ],
)
def test_refuses_tensors(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hier_attention(torch.zeros(shape, dtype=dtype), StudyLayout.from_grids(RAGGED), "scan")


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_refuses_scales(scale: float) -> None:
    with pytest.raises(ValueError, match=f"softmax_scale must be positive and finite, got {scale}"):
        hier_attention(torch.zeros(34, 3, 2, 8), StudyLayout.from_grids(RAGGED), "scan", softmax_scale=scale)


def test_a_layout_made_in_inference_mode_serves_in_training() -> None:
    with torch.inference_mode():
        layout = StudyLayout.from_grids(RAGGED)
        hier_attention(torch.zeros(34, 3, 2, 8), layout, "scan")
    qkv = torch.zeros(34, 3, 2, 8, requires_grad=True)
    hier_attention(qkv, layout, "scan").sum().backward()
    assert qkv.grad is not None


def test_refuses_mixed_devices() -> None:
    layout = StudyLayout.from_grids(RAGGED)
    with pytest.raises(ValueError, match="qkv is on cpu, the layout on meta"):
        hier_attention(torch.zeros(34, 3, 2, 8), layout.to("meta"), "scan")
    with pytest.raises(ValueError, match="qkv is on meta, the layout on cpu"):
        hier_attention(torch.zeros(34, 3, 2, 8, device="meta"), layout, "scan")


@pytest.mark.parametrize(
    ("level", "backend", "device", "message"),
    [
        ("voxel", "auto", "cpu", "level must be one of slice, scan, study, got 'voxel'"),
        ("scan", "fastest", "cpu", "unknown backend 'fastest'; there are .*cpu.*reference"),
        ("scan", "cpu", "meta", "backend 'cpu' cannot run here: needs CPU tensors, got meta"),
    ],
)
def test_refuses_names(level: Level, backend: str, device: str, message: str) -> None:
    layout = StudyLayout.from_grids(RAGGED).to(device)
    with pytest.raises(ValueError, match=message):
        hier_attention(torch.zeros(34, 3, 2, 8, device=device), layout, level, backend=backend)


def test_available_backends() -> None:
    assert set(BACKENDS) <= set(available_backends())
    assert "cpu" not in available_backends("cuda")
    assert "reference" in available_backends("cuda", torch.bfloat16, head_dim=80)


def test_auto_is_the_first_available_backend() -> None:
    layout = StudyLayout.from_grids(RAGGED)
    qkv = random_qkv(layout, "study", 32, torch.float32)
    auto, first = (hier_attention(qkv, layout, "study", backend=name) for name in ("auto", available_backends()[0]))
    assert available_backends()[0] != "reference"
    assert torch.equal(auto, first)


def test_env_names_every_backend() -> None:
    command = [sys.executable, "-m", "hlip_kernels.env"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert report.startswith("```text\n") and report.endswith("\n```\n")
    assert torch.__version__ in report
    assert re.search(r"^norm on cpu in bfloat16 \(auto: \w+\)$", report, re.MULTILINE)
    assert set(BACKENDS) <= set(re.findall(r"^  (\w+) +can run$", report, re.MULTILINE))
    assert set(ALL_BACKENDS) <= set(re.findall(r"^  (\w+) ", report, re.MULTILINE))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    layout = StudyLayout.from_grids([[(2, 1, 2)]])
    qkv = torch.randn(5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    out = hier_attention(qkv, layout, "study", backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_few_queries_attend_to_patches_where_they_lie(backend: str, dtype: torch.dtype) -> None:
    check_few_queries(ALL_BACKENDS[backend], dtype)


@pytest.mark.parametrize(
    ("cu_seqlens", "used", "rows"),
    [
        ([0, 3, 2, 5], None, 5),
        ([1, 3, 5], None, 5),
        ([0, 3, 4], None, 5),
        ([0, 3, 7], None, 5),
        ([0, 3, 5], [3, 3], 5),
        ([0, 3, 5], [-1, 2], 5),
        ([-1, 3, 5], [1, 2], 5),
        ([0, 3, 9], [3, 3], 5),
    ],
)
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_bounds_that_leave_the_rows_are_refused(
    side: str, cu_seqlens: list[int], used: list[int] | None, rows: int
) -> None:
    bad = Spans(torch.tensor(cu_seqlens, dtype=torch.int32), [], 5, None if used is None else torch.tensor(used).int())
    good = plain_spans([2] * (len(cu_seqlens) - 1))
    sides = {"queries": good, "keys": good, side: bad}
    lengths = {name: rows if name == side else int(good.cu_seqlens[-1]) for name in sides}
    q, k = (torch.zeros(lengths[name], HEADS, 16) for name in ("queries", "keys"))
    with pytest.raises(ValueError, match=f"cu_seqlens of {side}: expected bounds that rise"):
        ALL_BACKENDS["cpu"].forward(q, k, k, sides["queries"], sides["keys"], 1.0)


def test_a_level_is_the_flattened_dense_batch() -> None:
    """(B, P + N, C) of timm, transformers and MONAI, row by row."""
    layout = StudyLayout.from_grids([[(2, 3, 4)]] * 5, num_prefix=2)
    dense = torch.randn(5, 2 + 24, 3, HEADS, 16)
    q, k, v = dense.permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(hier_attention(dense.flatten(0, 1), layout, "study"), expected)


class Forgetful(AttentionBackend):
    name = "forgetful"

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        return []

    def forward(self, *_: object) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Forgotten(NormBackend):
    name = "forgotten"


def test_a_backend_without_a_method_is_an_error_when_it_is_registered() -> None:
    with pytest.raises(TypeError, match=r"Forgetful.*backward"):
        Forgetful()  # type: ignore[abstract]
    with pytest.raises(TypeError, match=r"Forgotten.*backward.*forward"):
        Forgotten()  # type: ignore[abstract]


class Unsteady(Forgetful):
    name = "unsteady"
    repeats = "never"

    def backward(self, *_: object) -> None:
        raise NotImplementedError


def test_deterministic_keeps_to_backends_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hlip_kernels.backends.BACKENDS", {"unsteady": Unsteady(), **ALL_BACKENDS})
    choose_backend.cache_clear()
    layout, qkv = StudyLayout.from_grids(RAGGED), torch.randn(34, 3, HEADS, 16)
    try:
        assert choose_backend("auto", "cpu", torch.float32, 16) == "unsteady"
        assert choose_backend("auto", "cpu", torch.float32, 16, deterministic=True) != "unsteady"
        hier_attention(qkv, layout, "scan", deterministic=True)
        with pytest.raises(ValueError, match="'unsteady' cannot run here: its gradients are not the same bits"):
            hier_attention(qkv, layout, "scan", backend="unsteady", deterministic=True)
        torch.use_deterministic_algorithms(True)
        with pytest.raises(ValueError, match="its gradients are not the same bits"):
            hier_attention(qkv, layout, "scan", backend="unsteady")
    finally:
        choose_backend.cache_clear()


@pytest.mark.parametrize("way", ["eager", "op", "compiled"])
def test_the_backend_is_chosen_for_the_level(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a table that knows a faster one for scans. A compiled model chooses when it runs."""
    chosen = []

    def choose(backend: str, *rest: object) -> str:
        level = rest[-1]
        name = ("cpu" if level == "scan" else "reference") if backend == "auto" else backend
        chosen.append((level, name))
        return name

    monkeypatch.setattr("hlip_kernels.attention.choose_backend", choose)
    layout = StudyLayout.from_grids([[(2, 2, 2), (1, 2, 3)]])
    function = hier_attention
    if way == "op":
        monkeypatch.setattr(ops, "unwatched", lambda *_: False)
    if way == "compiled":
        function = torch.compile(hier_attention, fullgraph=True, backend="eager")
    for level in LEVELS:
        qkv = torch.randn(layout.num_rows(level), 3, 2, 16).requires_grad_()
        function(qkv, layout, level).sum().backward()
    expected = [("slice", "reference"), ("scan", "cpu"), ("study", "reference")]
    assert list(dict.fromkeys(chosen)) == expected


def test_a_mode_may_watch_only_what_is_run_again() -> None:
    """Under checkpointing both ways keep as many tensors: a Function in forward, and the op in backward."""
    layout = StudyLayout.from_grids([[(2, 2, 2), (1, 2, 3)]])
    qkv = torch.randn(layout.num_rows("slice"), 3, 2, 16).requires_grad_()
    weight, bias = torch.ones(32), torch.zeros(32)

    def step(qkv: Tensor) -> Tensor:
        x = hier_attention(qkv, layout, "slice").flatten(1)
        return torch.cat(add_regroup_norm(x, x, layout, "slice", "scan", weight, bias))

    out = checkpoint(step, qkv, use_reentrant=False)
    expected = torch.autograd.grad(step(qkv).square().sum(), qkv)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(*torch.autograd.grad(out.square().sum(), qkv), *expected)
    assert counter.get_total_flops() > 0
