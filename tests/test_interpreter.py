"""bfloat16 in Triton's interpreter, as conftest corrects it, against torch."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

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
