"""Direct calls of attention that would leave their memory are refused."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from abi_cases import backend, needs_library  # noqa: F401
from hlip_kernels import native as library
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import AttentionBackend
from hlip_kernels.native import interface
from spans import plain_spans


def arguments(**changes: Any) -> dict[str, Any]:
    """Of forward and backward, for two groups of 11 rows each."""
    right: dict[str, Any] = {name: torch.ones(22, 2, 16) for name in ("q", "k", "v", "out", "grad_out")}
    right |= {name: torch.ones(22, 2, 16) for name in ("grad_q", "grad_k", "grad_v")}
    right |= {"queries": plain_spans((11, 11)), "keys": plain_spans((11, 11)), "softmax_scale": 0.25}
    return right | {"lse": torch.ones(2, 22)} | changes


def shaped(*shape: int, **options: Any) -> dict[str, Tensor]:
    """All tensors of this shape, and lse of that which goes with it."""
    rows, heads = shape[:2]
    names = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
    return {name: torch.ones(shape, **options) for name in names} | {"lse": torch.ones(heads, rows)}


def spans(
    side: str, *bounds: int, used: Sequence[int] | None = None, dtype: torch.dtype = torch.int32
) -> dict[str, Any]:
    seqused = None if used is None else torch.tensor(used, dtype=dtype)
    return {side: plain_spans((11, 11))._replace(cu_seqlens=torch.tensor(bounds, dtype=dtype), seqused=seqused)}


HEAD_DIMS = {f"head dim {n}": shaped(22, 2, n) for n in (0, 1, 8, 24, 40, 136, 144, 256)}
DTYPES = {str(dtype): shaped(22, 2, 16, dtype=dtype) for dtype in (torch.float16, torch.float64, torch.int32)}
WRONG: dict[str, dict[str, Any]] = {
    "all on meta": shaped(22, 2, 16, device="meta"),
    "no heads": shaped(22, 0, 16),
    "two dimensions": {"q": torch.ones(22, 32)},
    "keys on meta": {"k": torch.ones(22, 2, 16, device="meta")},
    "keys of two dimensions": {"k": torch.ones(22, 32), "v": torch.ones(22, 32)},
    "keys of more heads": {"k": torch.ones(22, 3, 16), "v": torch.ones(22, 3, 16)},
    "keys in bfloat16": {"k": torch.ones(22, 2, 16, dtype=torch.bfloat16)},
    "values of fewer rows": {"v": torch.ones(21, 2, 16)},
    "values of a wider head": {"v": torch.ones(22, 2, 32)},
    "fewer groups of queries": spans("queries", 0, 22),
    "fewer groups of keys": spans("keys", 0, 22),
    "no scale": {"softmax_scale": math.nan},
    "infinite scale": {"softmax_scale": -math.inf},
    **{
        f"{wrong} of {side}": spans(side, *values, **options)  # type: ignore[arg-type]
        for side in ("queries", "keys")
        for wrong, values, options in (
            ("int64 bounds", (0, 11, 22), {"dtype": torch.int64}),
            ("no bounds", (), {}),
            ("a used number less", (0, 11, 22), {"used": (11,)}),
        )
    },
}
# What numbers tell, which no backend reads back from a GPU.
WRONG_ROWS: dict[str, dict[str, Any]] = {
    "rows less": shaped(21, 2, 16),
    "rows more": shaped(23, 2, 16),
    **{
        f"{wrong} of {side}": spans(side, *values, used=used)
        for side in ("queries", "keys")
        for wrong, values, used in (
            ("bounds beyond the rows", (0, 11, 2200), None),
            ("bounds before the rows' end", (0, 11, 21), None),
            ("bounds that fall", (0, 33, 22), None),
            ("bounds below zero", (0, -11, 22), None),
            ("bounds that begin below zero", (-5, 11, 22), None),
            ("bounds that begin late", (5, 11, 22), None),
            ("more used than there are", (0, 11, 22), (12, 1)),
            ("used below zero", (0, 11, 22), (1, -1)),
            ("used beyond the rows", (0, 11, 2200), (1, 12)),
            ("used from below zero", (-5, 11, 22), (4, 4)),
            ("used where bounds fall", (0, 33, 22), (1, 0)),
            ("used before a bound beyond the rows", (0, 23, 2200), (1, 0)),
            ("used at the least bound", (-(2**31), 11, 22), (2**31 - 1, 0)),
            ("used from the greatest bound", (0, 2**31 - 1, -(2**31)), (1, 1)),
        )
    },
}
WRONG_BACKWARD: dict[str, dict[str, Any]] = {
    "out of fewer rows": {"out": torch.ones(21, 2, 16)},
    "out of fewer heads": {"out": torch.ones(22, 1, 16)},
    "out of a narrower head": {"out": torch.ones(22, 2, 8)},
    "out in bfloat16": {"out": torch.ones(22, 2, 16, dtype=torch.bfloat16)},
    "grad_out of fewer rows": {"grad_out": torch.ones(2, 2, 16)},
    "grad_out in float64": {"grad_out": torch.ones(22, 2, 16, dtype=torch.float64)},
    "grad_out on meta": {"grad_out": torch.ones(22, 2, 16, device="meta")},
    "lse the other way": {"lse": torch.ones(22, 2)},
    "lse of fewer rows": {"lse": torch.ones(2, 10)},
    "lse in bfloat16": {"lse": torch.ones(2, 22, dtype=torch.bfloat16)},
    "grad_q of fewer rows": {"grad_q": torch.ones(21, 2, 16)},
    "grad_k of fewer heads": {"grad_k": torch.ones(22, 1, 16)},
    "grad_v in bfloat16": {"grad_v": torch.ones(22, 2, 16, dtype=torch.bfloat16)},
    "grad_v on meta": {"grad_v": torch.ones(22, 2, 16, device="meta")},
}


@pytest.fixture(params=["forward", "backward"])
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


def call(backend: AttentionBackend, direction: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results."""
    q, k, v, queries, keys, scale = (given[name] for name in ("q", "k", "v", "queries", "keys", "softmax_scale"))
    if direction == "forward":
        return backend.forward(q, k, v, queries, keys, scale)
    grads = given["grad_q"], given["grad_k"], given["grad_v"]
    backend.backward(grads, given["grad_out"], q, k, v, given["out"], given["lse"], queries, keys, scale, True)
    return grads


@needs_library
@pytest.mark.parametrize("wrong", [*HEAD_DIMS, *DTYPES, "all on meta", *WRONG_ROWS])
def test_a_direct_call_that_would_leave_its_memory_is_refused(wrong: str, direction: str) -> None:
    call(BACKENDS["native"], direction, arguments())
    with pytest.raises(ValueError):
        call(BACKENDS["native"], direction, arguments(**(HEAD_DIMS | DTYPES | WRONG | WRONG_ROWS)[wrong]))


@pytest.mark.parametrize("wrong", [key for key in WRONG if key != "all on meta"])
def test_every_backend_refuses_the_same(wrong: str, backend: AttentionBackend, direction: str) -> None:
    with pytest.raises(ValueError):
        call(backend, direction, arguments(**WRONG[wrong]))


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_the_other_backend_on_cpus_refuses_the_same_rows(wrong: str, direction: str) -> None:
    call(BACKENDS["cpu"], direction, arguments())
    with pytest.raises(ValueError):
        call(BACKENDS["cpu"], direction, arguments(**WRONG_ROWS[wrong]))


@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_what_backward_is_given_belongs_together(wrong: str, backend: AttentionBackend) -> None:
    with pytest.raises(ValueError, match=wrong.split()[0]):
        call(backend, "backward", arguments(**WRONG_BACKWARD[wrong]))


@needs_library
def test_memory_of_any_strides(direction: str) -> None:
    torch.manual_seed(0)
    own, turned = BACKENDS["native"], {name: torch.randn(16, 2, 22).permute(2, 1, 0) for name in ("q", "k", "v")}
    plain = {name: x.contiguous() for name, x in turned.items()}
    out, lse = call(own, "forward", arguments(**plain))
    turned |= {"out": out.permute(2, 1, 0).contiguous().permute(2, 1, 0), "lse": lse.T.contiguous().T}
    turned |= {name: torch.ones(16, 2, 22).permute(2, 1, 0) for name in ("grad_q", "grad_k", "grad_v")}
    expected = call(own, direction, arguments(**plain, out=out, lse=lse))
    for x, y in zip(call(own, direction, arguments(**turned)), expected, strict=True):
        assert torch.equal(x, y)


def structure(
    memory: Tensor, bounds: dict[str, Sequence[int]], **changes: int
) -> tuple[interface.Attention, list[Tensor]]:
    """Of two groups of 11 rows each, in these rows of memory; and what its bounds lie in."""
    held = {name: torch.tensor(values, dtype=torch.int32) for name, values in bounds.items()}
    addresses = {name: x.data_ptr() for name, x in held.items()}
    names = ("q", "k", "v", "out", "lse", "grad_out", "grad_q", "grad_k", "grad_v")
    addresses |= {name: row.data_ptr() for name, row in zip(names, memory, strict=True)}
    fields: dict[str, Any] = {"q_rows": 22, "k_rows": 22, "groups": 2, "heads": 2, "head_dim": 16, "threads": 1}
    fields |= dict.fromkeys(("q_stride", "k_stride", "grad_q_stride", "grad_k_stride"), 32)
    return interface.Attention(**addresses, **(fields | {"softmax_scale": 0.25} | changes)), list(held.values())


BOUNDS: dict[str, Sequence[int]] = {"q_bounds": (0, 11, 22), "k_bounds": (0, 11, 22)}


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [{"head_dim": n} for n in (-16, 0, 8, 24, 136, 256)]
    + [{"bfloat16": 2}, {"bfloat16": -1}, {"isa": -1}, {"isa": 4}, {"threads": 0}, {"heads": -1}, {"groups": -1}]
    + [{name: n} for name in ("q_rows", "k_rows") for n in (21, 23, 0, -1)]
    + [{name: n} for name in ("q_stride", "k_stride") for n in (31, 0, -32)]
    + [{name: values} for name in ("q_bounds", "k_bounds") for values in ((0, 33, 22), (-1, 11, 22), (1, 11, 22))]
    + [{name: values} for name in ("q_used", "k_used") for values in ((12, 0), (-1, 11), (0, 12))],
    ids=str,
)
def test_the_library_refuses_by_itself(wrong: dict[str, Any], direction: str) -> None:
    memory = torch.full((9, 4096), 7.0)
    assert not called(memory, direction)
    memory[:] = 7
    assert called(memory, direction, **wrong)
    assert (memory == 7).all()


@needs_library
@pytest.mark.parametrize("name", ["grad_q_stride", "grad_k_stride"])
def test_gradients_whose_rows_overlap_are_refused(name: str) -> None:
    memory = torch.full((9, 4096), 7.0)
    assert called(memory, "backward", **{name: 31})
    assert (memory == 7).all()
    assert not called(memory, "forward", **{name: 31})  # which has none


def called(memory: Tensor, direction: str, isa: int = 0, **changes: Any) -> bool:
    """Whether the library refuses; both of its functions do, or neither."""
    functions = library.native().library
    assert functions is not None
    bounds = {name: values for name, values in changes.items() if isinstance(values, tuple)}
    numbers = {name: value for name, value in changes.items() if name not in bounds}
    attention, held = structure(memory, BOUNDS | bounds, **numbers)
    settings = ctypes.byref(attention), isa, int(direction == "backward")
    size = functions.hlip_attention_scratch(*settings)
    scratch = torch.empty(max(size, 0) + 64, dtype=torch.uint8)
    attention.scratch = -(-scratch.data_ptr() // 64) * 64
    refused = functions.hlip_attention(*settings)
    del held  # not before
    assert (size, refused) == (-1, -1) or (size >= 0 and refused == 0)
    return bool(refused)


@needs_library
def test_scratch_suffices_for_several_long_groups(direction: str) -> None:
    """A shorter one may have more of its heads at a time, and then its tiles take up more."""
    functions = library.native().library
    assert functions is not None

    def scratch(*lengths: int) -> int:
        bounds = tuple(accumulate(lengths, initial=0))
        rows, groups = bounds[-1], len(lengths)
        of_one = structure(
            torch.empty(9, 0),
            {"q_bounds": bounds, "k_bounds": bounds},
            q_rows=rows,
            k_rows=rows,
            groups=groups,
            heads=12,
            head_dim=64,
            **dict.fromkeys(("q_stride", "k_stride", "grad_q_stride", "grad_k_stride"), 768),
        )
        return functions.hlip_attention_scratch(ctypes.byref(of_one[0]), 0, int(direction == "backward"))

    sizes = range(20_000, 260_000, 20_000)
    assert scratch(*sizes) >= max(map(scratch, sizes))
