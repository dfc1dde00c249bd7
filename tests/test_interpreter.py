"""bfloat16 in Triton's interpreter: refused as it is; as conftest corrects it, against torch."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product

import pytest
import torch

from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends import triton as backend

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

BF16 = torch.bfloat16
EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(BF16)
SIDE = 16


@triton.jit
def _cast(X, Y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(Y + o, tl.load(X + o).to(Y.dtype.element_ty))


@triton.jit
def _dot(A, B, C, D, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(D + o, tl.dot(tl.load(A + o), tl.trans(tl.load(B + o)), tl.load(C + o)))


@triton.jit
def _arithmetic(X, Y, Out, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(X + o)
    y = tl.load(Y + o)
    tl.store(Out + o, tl.where(x > y, -x * y, x + y * 0.3))


@triton.jit
def _masked_copy(X, Y, M, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(Y + o, tl.load(X + o, mask=o < M, other=-1.5), mask=o < N - 2)


@triton.jit
def _sum(X, Y, N: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast[(1,)](x, out, x.numel())
    return out


def assert_same(ours: torch.Tensor, torchs: torch.Tensor) -> None:
    assert ours.dtype == torchs.dtype
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit()[~ours.isnan()], torchs.signbit()[~torchs.isnan()])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # signalling NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bfloat16_widens_exactly(dtype: torch.dtype) -> None:
    assert_same(cast(EVERY_BFLOAT16, dtype), EVERY_BFLOAT16.to(dtype))


def test_float32_is_rounded_to_nearest_even() -> None:
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF], dtype=torch.int32)
    high = EVERY_BFLOAT16.view(torch.int16).to(torch.int32) << 16
    x = (high[:, None] | low).reshape(-1).view(torch.float32)  # ties, their neighbours, subnormals, inf, nan
    assert_same(cast(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.int64])
def test_casts_of_other_types(dtype: torch.dtype) -> None:
    x = (torch.randn(256, generator=torch.Generator().manual_seed(0)) * 1000).to(dtype)
    assert_same(cast(x, BF16), x.to(BF16))
    assert_same(cast(x.to(BF16), dtype), x.to(BF16).to(dtype))


def test_dots_add_exact_products_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIDE, SIDE, generator=generator).to(BF16) for _ in range(2))
    c = torch.randn(SIDE, SIDE, generator=generator)
    out = torch.empty_like(c)
    _dot[(1,)](a, b, c, out, SIDE)
    torch.testing.assert_close(out.double(), a.double() @ b.double().T + c.double(), rtol=0, atol=1e-5)


def test_arithmetic_and_comparisons() -> None:
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).to(BF16)
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, len(x))
    assert_same(out, torch.where(x > y, -x * y, x + y * torch.tensor(0.3, dtype=BF16)))


def test_loads_and_stores_move_bits() -> None:
    x, out = EVERY_BFLOAT16, torch.full_like(EVERY_BFLOAT16, 7.0)
    _masked_copy[(1,)](x, out, 60000, len(x))
    assert torch.equal(out[:60000].view(torch.int16), x[:60000].view(torch.int16))
    assert out[60000:-2].eq(-1.5).all()
    assert out[-2:].eq(7.0).all()


def test_reductions_are_refused() -> None:
    x = torch.ones(SIDE, dtype=BF16)
    with pytest.raises(InterpreterError, match="cast to float32 first"):
        _sum[(1,)](x, torch.empty(1, dtype=BF16), SIDE)


AS_IT_IS = """
import json
import torch
from hlip_kernels import StudyLayout, add_regroup_norm, hier_attention
from hlip_kernels.backends import choose_backend, choose_norm_backend

layout = StudyLayout.from_grids([[(2, 4, 5), (3, 4, 4)], [(1, 4, 2)]])
torch.manual_seed(0)
qkv, grad = torch.randn(99, 3, 2, 16).double(), torch.randn(99, 2, 16).double()
rows, params, grads = torch.randn(2, 99, 64).double(), torch.randn(2, 64).double(), torch.randn(2, 98, 64).double()


def attention(dtype, _, backend):
    x = qkv.to(dtype).requires_grad_()
    out = hier_attention(x, layout, "scan", backend=backend)
    return out, *torch.autograd.grad(out, x, grad.to(dtype))


def norm(dtype, update_dtype, backend):
    given = [x.to(d).requires_grad_() for x, d in zip(rows, (dtype, update_dtype))]
    weight, bias = (x.to(dtype) for x in params)
    outs = add_regroup_norm(*given, layout, "scan", "study", weight, bias, backend=backend)
    return *outs, *torch.autograd.grad(outs, given, [g.to(o.dtype) for g, o in zip(grads, outs)])


def measure(function, dtypes, eager):
    try:
        got = function(*dtypes, "triton")
    except ValueError as error:
        return str(error)
    exact = function(torch.float64, torch.float64, eager)
    theirs = function(*dtypes, eager)
    return max(((a - e).abs().max() / ((b - e).abs().max() + 1e-6)).item() for a, b, e in zip(got, theirs, exact))


types = torch.float32, torch.float16, torch.bfloat16
pairs = [(a, b) for a in types for b in types]
print(json.dumps({
    "attention": [measure(attention, (dtype, dtype), "reference") for dtype in types],
    "norm": [measure(norm, pair, "torch") for pair in pairs],
    "auto": [choose_backend("auto", "cpu", torch.bfloat16, 64), choose_backend("auto", "cuda", torch.bfloat16, 64)],
    "auto norm": [choose_norm_backend("auto", "cuda", *pair) for pair in pairs],
}))
"""


def test_as_it_is_the_interpreter_is_refused_where_it_is_wrong() -> None:
    """In a process without conftest: a dtype is refused, or errors are those of eager PyTorch."""
    result = subprocess.run([sys.executable, "-c", AS_IT_IS], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    wrong = [False, False, True]
    pairs = [first or second for first, second in product(wrong, wrong)]
    for name, refused in (("attention", wrong), ("norm", pairs)):
        for measured, is_refused in zip(report[name], refused, strict=True):
            assert isinstance(measured, str) == is_refused
            assert "bfloat16" in measured and "TRITON_INTERPRET" in measured if is_refused else measured < 2
    assert "triton" not in report["auto"]
    assert report["auto norm"] == ["torch" if refused else "triton" for refused in pairs]


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes", "Y", "0", "off", "t", ""])
def test_the_variable_is_read_as_triton_reads_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", (torch.float16, torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", value)
    refused = any("interpreter" in reason for reason in BACKENDS["triton"].not_supported_reasons("cuda", BF16, 64))
    assert refused == triton.knobs.runtime.interpret
    assert (
        "needs CUDA or ROCm tensors, got cpu" in BACKENDS["triton"].not_supported_reasons("cpu", torch.float32, 64)
    ) != refused
