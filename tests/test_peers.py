"""The benchmark of attention: every way computes the same, what is wrong is found, and figures are counted right."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchlib import kernels, peers, problems
from hlip_kernels import Level, hier_attention
from peers_cases import HERE, RAGGED, problem, tensors
from slow_kernels import SlowKernels, import_flash_source, take_cpu_tensors
from spans import HEADS
from test_external_flash import needs_flash_source

EQUAL = [[(2, 3, 3)] * 2] * 2


def expected(case: problems.Problem) -> dict[str, Tensor]:
    qkv, grad_out = tensors(case)
    wide = qkv.double().requires_grad_()
    out = hier_attention(wide, case.layout, case.level, backend="reference")
    return {"out": out.detach(), "grad": torch.autograd.grad(out, wide, grad_out.double())[0]}


def way_of(name: str, case: problems.Problem) -> kernels.Way:
    return kernels.Way(peers.PEERS[name](case), *tensors(case))


def check(name: str, case: problems.Problem, modes: Sequence[str] = kernels.MODES) -> None:
    way = way_of(name, case)
    for mode in modes:
        for part, found in way.first_call(mode)[0].items():
            torch.testing.assert_close(found.double(), expected(case)[part], rtol=1e-4, atol=1e-5, msg=f"{name} {part}")


@pytest.mark.parametrize("level", ["slice", "scan", "study"])
@pytest.mark.parametrize("num_prefix", [1, 2])
@pytest.mark.parametrize("name", HERE)
def test_every_way_computes_the_same(name: str, num_prefix: int, level: Level) -> None:
    if name == "hlip-triton":
        pytest.importorskip("triton")
    check(name, problem(RAGGED, level, num_prefix))


@pytest.mark.parametrize("level", ["slice", "scan", "study"])
@pytest.mark.parametrize("name", ["sdpa-dense", "published"])
def test_ways_for_equal_groups(name: str, level: Level) -> None:
    check(name, problem(EQUAL, level))
    assert peers.PEERS[name](problem(EQUAL, level)).reasons() == []
    assert peers.PEERS[name](problem(RAGGED, level)).reasons() != []


def test_the_published_way_carries_residual_rows_to_the_level() -> None:
    case = problem(EQUAL, "study")
    way = way_of("published", case)
    residual = way.inputs[-1]
    assert residual.shape == (4, 1 + 18, case.heads * case.head_dim)
    out, grads = way.training()
    carried = out[1]
    assert carried.shape == (2, 1 + 36, residual.shape[2])
    torch.testing.assert_close(carried[:, 0], residual[:, 0].unflatten(0, (2, 2)).mean(1))
    assert torch.equal(carried[:, 1:], residual[:, 1:].reshape(2, 36, -1))
    assert torch.equal(grads[3][:, 1:].reshape(2, 36, -1), way.grad_out[1][:, 1:])
    two = peers.PEERS["published"](problem(EQUAL, "study", num_prefix=2))
    assert two.reasons() == ["one prefix row only"]


def test_flex_with_its_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, which takes a C++ compiler and ten seconds; compiled, it is compared in every run."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    check("flex", problem(RAGGED, "scan"), ["forward"])


class TheirKernels(SlowKernels):
    """Called by the libraries themselves, not by our backends: nothing is said of split keys, and the padding that
    xformers' forward leaves, which is infinite, goes into its backward as it is."""

    num_splits = None

    def aten__efficient_attention_forward(self, given: dict[str, Any]) -> Any:
        out, lse, *rest = super().aten__efficient_attention_forward(given)
        return out, lse.nan_to_num(nan=torch.inf), *rest


@pytest.mark.parametrize("level", ["slice", "study"])
def test_varlen_by_hand(level: Level) -> None:
    pytest.importorskip("torch.nn.attention.varlen")
    with TheirKernels() as slow:
        check("varlen", problem(RAGGED, level, dtype=torch.float64))
    assert slow.called == ["torch_attn._varlen_attn"] * 2 + ["torch_attn._varlen_attn_backward"]


@pytest.mark.parametrize("level", ["slice", "study"])
def test_xformers_by_hand(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xformers")
    take_cpu_tensors(monkeypatch, "cutlass")
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # or it thinks of AMD's GPUs only
    with TheirKernels() as slow:
        check("xformers", problem(RAGGED, level, num_prefix=2, dtype=torch.float64), ["training"])
    assert slow.called[-1] == "aten._efficient_attention_backward"


@pytest.mark.parametrize(
    ("name", "module"), [("flash-attn-3", "flash_attn_interface"), ("flash-attn-4", "flash_attn.cute")]
)
@pytest.mark.parametrize("pair", [True, False])  # some releases return the log-sum-exp, too
def test_newer_flash_attention_is_given_its_bounds(
    name: str, module: str, pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(RAGGED, "study", num_prefix=2)
    longest = int(case.lengths.max())

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> Any:  # fmt: skip
        """Compute attention between bounds."""
        assert (max_seqlen_q, max_seqlen_k, cu_seqlens_k.dtype) == (longest, longest, torch.int32)
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        split = (x.tensor_split(cu_seqlens_q[1:-1].long(), 2) for x in heads)
        groups = [torch.nn.functional.scaled_dot_product_attention(*group) for group in zip(*split, strict=True)]
        out = torch.cat(groups, 2)[0].transpose(0, 1)
        return (out, None) if pair else out

    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    theirs = ModuleType(module)
    theirs.flash_attn_varlen_func = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, theirs)
    check(name, case)


def test_flash_attn_4_takes_these_arguments() -> None:
    folder = Path(sys.prefix) / "flash-attn-4" / "flash_attn" / "cute"
    if not folder.is_dir():
        pytest.skip("flash-attn-4 is not there (make test puts it there)")
    functions = {
        node.name: {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        for node in ast.parse((folder / "interface.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    bounds = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    assert bounds <= functions["flash_attn_varlen_func"]


def flash_attn_by_hand() -> list[str]:
    import_flash_source()
    with TheirKernels() as slow:
        check("flash-attn", problem(RAGGED, "scan", dtype=torch.float64))
    return slow.called


@needs_flash_source
def test_flash_attn_by_hand(fake_cuda: Callable[..., Any]) -> None:
    forward = "flash_attn._flash_attn_varlen_forward"
    assert fake_cuda(flash_attn_by_hand) == [forward, forward, "flash_attn._flash_attn_varlen_backward"]


def test_those_that_need_a_gpu_say_so() -> None:
    theirs = ["varlen", "sdpa-cudnn", "sdpa-flash", "flash-attn", "flash-attn-3", "flash-attn-4", "xformers"]
    for name in (*theirs, "hlip-varlen", "hlip-flash", "hlip-flash3", "hlip-flash4", "hlip-xformers"):
        assert any("needs CUDA" in reason for reason in peers.PEERS[name](problem(RAGGED)).reasons()), name


def test_operations_and_bytes_of_a_problem() -> None:
    case = problem(EQUAL, "study", dtype=torch.bfloat16)
    way = way_of("sdpa-dense", case)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        way.forward()
    assert case.flops(backward=False) == counter.get_total_flops() == 4 * 2 * 37**2 * HEADS * 16
    assert case.flops(backward=True) == 14 * 2 * 37**2 * HEADS * 16
    qkv, out, statistics = 74 * 3 * HEADS * 16 * 2, 74 * HEADS * 16 * 2, 74 * HEADS * 4
    assert case.least_bytes(backward=False) == qkv + out + statistics
    assert case.least_bytes(backward=True) == 3 * qkv + 3 * out + 2 * statistics


def test_what_autograd_keeps() -> None:
    case = problem(EQUAL, "study")
    rows = case.num_rows * HEADS
    *_, dense = way_of("sdpa-dense", case).first_call("training")
    assert dense["saved_bytes"] == rows * 16 * 4 + rows * 4  # out and its log-sum-exp
    assert way_of("nested", case).first_call("training")[1]["saved_bytes"] > dense["saved_bytes"]
    assert way_of("sdpa-dense", case).first_call("forward")[1]["saved_bytes"] == 0


@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_the_formula_in_pieces(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ORACLE_ELEMENTS", elements)
    case = problem([[(1, 5, 5)]], "study", dtype=torch.float64)
    qkv, grad_out = tensors(case)
    found = kernels.exact(qkv, grad_out)
    for part, value in expected(case).items():
        torch.testing.assert_close(found[part], value)
