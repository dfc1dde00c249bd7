"""Attention: what is refused, and which backend is chosen."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attention_cases import BACKENDS, DTYPES, HEADS, RAGGED, nan_filled_memory, random_qkv  # noqa: F401
from hlip_kernels import Level, StudyLayout, add_regroup_norm, available_backends, hier_attention, ops
from hlip_kernels.backends import BACKENDS as ALL_BACKENDS
from hlip_kernels.backends import choose_backend
from hlip_kernels.backends.base import AttentionBackend, NormBackend, Spans
from hlip_kernels.layout import LEVELS
from spans import check_few_queries, plain_spans


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
