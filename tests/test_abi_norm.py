"""Direct calls of norms, GELU and products that would leave their memory are refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from abi_cases import backend, needs_library  # noqa: F401
from hlip_kernels import native as library
from hlip_kernels.backends import NORM_BACKENDS, native_linear, native_norm_gelu
from hlip_kernels.backends.base import NormBackend, Regroup
from hlip_kernels.native import interface


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def between_levels(**changes: Any) -> Regroup:
    """From two groups of 11 rows to one, a prefix row each."""
    right: dict[str, Any] = {
        "src": ints(0, 11, 22),
        "dst": ints(0, 21),
        "tiles": ints(0, 0, 1, 0).view(2, 2),
        "children": ints(0, 2),
        "parents": ints(0, 0),
        "num_prefix": 1,
        "coarser": True,
    }
    return Regroup(**(right | changes))


def one_level(**changes: Any) -> Regroup:
    return between_levels(dst=ints(0, 11, 22), children=None, parents=None, coarser=False)._replace(**changes)


UNREAD = {  # what a kernel for GPUs does not see
    "children beyond the groups": between_levels(children=ints(0, 3)),
    "children that begin late": between_levels(children=ints(1, 2)),
    "a coarse group without children": between_levels(children=ints(0, 0, 2), dst=ints(0, 1, 22)),
    "children that fall": between_levels(children=ints(0, 3, 2), dst=ints(0, 11, 22)),
    "children of a group with other patches": between_levels(children=ints(0, 1, 2), dst=ints(0, 10, 22)),
    "bounds beyond the rows": between_levels(src=ints(0, 11, 200)),
    "bounds before the rows' end": between_levels(src=ints(0, 11, 21)),
    "bounds that fall": between_levels(src=ints(0, 30, 22)),
    "bounds that begin below zero": between_levels(src=ints(-1, 11, 22)),
    "dst beyond the rows": between_levels(dst=ints(0, 200)),
    "dst before the rows' end": between_levels(dst=ints(0, 20)),
    "a group smaller than its prefix": between_levels(src=ints(0, 0, 22)),
    "a group of dst smaller than its prefix": between_levels(children=ints(0, 1, 2), dst=ints(0, 0, 22)),
    "two levels without children": one_level(dst=ints(0, 12, 22)),
    "prefix rows of another number": between_levels(num_prefix=3),
}
REGROUPS = {
    "int64 children": between_levels(children=torch.tensor([0, 2])),
    "more children than groups": between_levels(children=ints(0, 1, 2)),
    "no children": between_levels(children=None, parents=None),
    "children without parents": between_levels(parents=None),
    "parents without children": one_level(parents=ints(0, 1)),
    "parents of fewer groups": between_levels(parents=ints(0)),
    "int64 bounds": between_levels(src=torch.tensor([0, 11, 22])),
    "int64 bounds of dst": between_levels(dst=torch.tensor([0, 21])),
    "bounds on meta": between_levels(src=ints(0, 11, 22).to("meta")),
    "more prefix rows than rows": between_levels(num_prefix=30),
    "prefix rows that only dst has room for": between_levels(num_prefix=12),
    "prefix rows below zero": between_levels(num_prefix=-1),
}
ROWS: dict[str, dict[str, Any]] = {
    "residual": {"residual": torch.ones(21, 8)},
    "residual in float16": {"residual": torch.ones(22, 8, dtype=torch.float16)},
    "residual in float64": {"residual": torch.ones(22, 8, dtype=torch.float64)},
    "three dimensions": {"residual": torch.ones(22, 8, 1)},
    "update": {"update": torch.ones(21, 8)},
    "narrower update": {"update": torch.ones(22, 4)},
    "update on meta": {"update": torch.ones(22, 8, device="meta")},
    "path_scale": {"path_scale": torch.ones(1)},
    "layer_scale": {"layer_scale": torch.ones(4)},
    "weight": {"weight": torch.ones(7)},
    "bias": {"bias": torch.ones(9, 1)},
    "mean": {"mean": torch.ones(2)},
    "rstd in float64": {"rstd": torch.ones(21, dtype=torch.float64)},
    "grad_x": {"grad_x": torch.ones(22, 8)},
    "grad_y": {"grad_y": torch.ones(20, 8)},
    "x": {"x": torch.ones(22, 8)},
    "no update": {"update": None},
}
FORWARD = ("residual", "update", "path_scale", "layer_scale", "weight", "bias", "regroup", "eps")
BACKWARD = ("grad_x", "grad_y", "x", "mean", "rstd", "update", "path_scale", "layer_scale", "weight", "regroup")


def norm(backend: NormBackend, changes: dict[str, Any]) -> None:
    """Forward and backward of those that take what is changed. Raises ValueError only if all do."""
    right = {
        **{name: torch.ones(22, 8) for name in ("residual", "update")},
        **{name: torch.ones(21, 8) for name in ("x", "grad_x", "grad_y")},
        **{name: torch.ones(21) for name in ("mean", "rstd")},
        **{name: torch.ones(8) for name in ("weight", "bias", "layer_scale")},
        "path_scale": torch.ones(2),
        "regroup": between_levels(),
        "eps": 1e-6,
    }
    (changed,) = changes or {"regroup": None}
    for function, names in ((backend.forward, FORWARD), (backend.backward, BACKWARD)):
        if changed not in names or (changed == "update" and (changes["update"] is None and names is FORWARD)):
            continue
        given = [(right | changes)[name] for name in names]
        if not changes:
            function(*given)
            continue
        with pytest.raises(ValueError):
            function(*given)


@needs_library
@pytest.mark.parametrize("right", [between_levels(), one_level()])
def test_rows_of_a_norm_belong_together(right: Regroup) -> None:
    backend, rows = NORM_BACKENDS["native"], torch.ones(22, 8)
    x, y, _, _ = backend.forward(rows, rows, None, None, torch.ones(8), torch.ones(8), right, 1e-6)
    assert (x == 2).all()
    assert (y == 1).all()
    norm(backend, {})


@needs_library
@pytest.mark.parametrize("wrong", [*UNREAD, *REGROUPS, *ROWS])
def test_a_norm_called_directly_is_refused(wrong: str) -> None:
    regroups = UNREAD | REGROUPS
    norm(NORM_BACKENDS["native"], {"regroup": regroups[wrong]} if wrong in regroups else ROWS[wrong])


@pytest.mark.parametrize("wrong", [*REGROUPS, *(name for name in ROWS if not name.startswith("residual in"))])
def test_triton_refuses_the_same(wrong: str) -> None:
    pytest.importorskip("triton")
    norm(NORM_BACKENDS["triton"], {"regroup": REGROUPS[wrong]} if wrong in REGROUPS else ROWS[wrong])


@needs_library
@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize(
    "wrong",
    [
        *({"tokens": n} for n in (-1, 19)),
        *({"src_groups": n} for n in (-1, 1)),
        *({"num_prefix": n} for n in (-1, 2)),
        *({"src": bounds} for bounds in (None, (0, 30, 22))),
        *({"dst": bounds} for bounds in (None, (0, 22))),
        *({"children": bounds} for bounds in (None, (0, 3))),
        {"dst_groups": 2},
        {"threads": 0},
        {"src": None, "dst": None},
    ],
    ids=str,
)
def test_the_library_refuses_a_norm_by_itself(wrong: dict[str, Any], backward: int) -> None:
    functions = library.native().library
    assert functions is not None
    memory = torch.full((14, 4096), 7.0)
    names = "residual", "update", "weight", "bias", "x", "y", "mean", "rstd", "grad_y", "grad_residual", "partial"
    fields: dict[str, Any] = {name: row.data_ptr() for name, row in zip((*names, "sums"), memory, strict=False)}
    fields |= {"tokens": 20, "src_groups": 2, "dst_groups": 1, "num_prefix": 1, "width": 8, "threads": 1, "eps": 1e-6}
    maps = {"src": (0, 11, 22), "dst": (0, 21), "children": (0, 2)} | wrong
    held = {name: ints(*maps[name]) for name in ("src", "dst", "children") if maps[name] is not None}
    fields |= {name: value for name, value in wrong.items() if name not in ("src", "dst", "children")}
    call = interface.Norm(**fields, **{name: x.data_ptr() for name, x in held.items()})
    assert functions.hlip_norm(ctypes.byref(call), 0, backward) == -1
    assert (memory == 7).all()


@needs_library
@pytest.mark.parametrize(
    ("grad", "x"),
    [
        (torch.ones(4, 8), torch.ones(4, 9)),
        (torch.ones(32), torch.ones(4, 8)),
        (torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(4, 8)),
        (torch.ones(4, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)),
        (torch.ones(4, 8, dtype=torch.float16), torch.ones(4, 8, dtype=torch.float16)),
        (torch.ones(8, 4).T, torch.ones(4, 8)),
        (torch.ones(4, 8), torch.ones(8, 4).T),
        (torch.ones(4, 1).expand(4, 8), torch.ones(4, 8)),
        (torch.ones(4, 8, device="meta"), torch.ones(4, 8)),
    ],
)
def test_a_gelu_called_directly_is_refused(grad: Tensor, x: Tensor) -> None:
    with pytest.raises(ValueError):
        native_norm_gelu.gelu_backward_(grad, x)


def half(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, **options)


def tiles(inner: int, columns: int) -> Tensor:
    return torch.zeros(native_linear.tiles_shape(inner, columns), dtype=torch.uint8)


PRODUCTS: dict[str, Callable[[], Any]] = {
    "a weight in float32": lambda: native_linear.pack(torch.ones(8, 8), False),
    "a weight of one dimension": lambda: native_linear.pack(half(8), False),
    "rows in float32": lambda: native_linear.layers(torch.ones(4, 40), [tiles(40, 8)], [], [8], False),
    "rows of three dimensions": lambda: native_linear.layers(half(4, 40, 1), [tiles(40, 8)], [], [8], False),
    "wider rows": lambda: native_linear.layers(half(4, 70), [tiles(40, 8)], [], [8], False),
    "more columns": lambda: native_linear.layers(half(4, 40), [tiles(40, 8)], [], [80], False),
    "tiles of float32": lambda: native_linear.layers(half(4, 40), [tiles(40, 8).float()], [], [8], False),
    "a short bias": lambda: native_linear.layers(half(4, 40), [tiles(40, 8)], [torch.ones(7)], [8], False),
    "no layer": lambda: native_linear.layers(half(4, 40), [], [], [], False),
    "three layers": lambda: native_linear.layers(half(4, 32), [tiles(32, 32)] * 3, [], [32] * 3, False),
    "a layer without columns": lambda: native_linear.layers(half(4, 32), [tiles(32, 32)] * 2, [], [32], False),
    "layers that do not fit": lambda: native_linear.mlp(half(4, 40), [tiles(40, 8), tiles(64, 40)], [], [8, 40]),
    "one bias of two": lambda: native_linear.mlp(half(4, 8), [tiles(8, 8)] * 2, [torch.ones(8)], [8, 8]),
    "hidden rows less": lambda: native_linear.hidden_gradient(half(4, 40), tiles(40, 8), half(3, 8)),
    "hidden in float32": lambda: native_linear.hidden_gradient(half(4, 40), tiles(40, 8), torch.ones(4, 8)),
    "gradient of other rows": lambda: native_linear.weight_gradient(
        half(5, 8), half(4, 40), torch.ones(8, 40), torch.ones(8), False
    ),
    "a smaller weight": lambda: native_linear.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(8, 30), torch.ones(8), False
    ),
    "a weight by columns": lambda: native_linear.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(40, 8).T, torch.ones(8), False
    ),
    "a bias in bfloat16": lambda: native_linear.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(8, 40), half(8), False
    ),
    "rows in float64": lambda: native_linear.weight_gradient(
        half(4, 8).double(), half(4, 40), torch.ones(8, 40), torch.ones(8), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", PRODUCTS)
def test_a_product_called_directly_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError) as caught:
        PRODUCTS[wrong]()
    assert "AMX" not in str(caught.value)  # the same everywhere


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    other = library.native()._replace(isa="avx512")
    monkeypatch.setattr(native_linear, "native", lambda: other)
    yield


@needs_library
@pytest.mark.usefixtures("without_amx")
def test_products_are_refused_where_there_is_no_amx() -> None:
    with pytest.raises(ValueError, match="AMX"):
        native_linear.pack(half(8, 8), False)
    with pytest.raises(ValueError, match="AMX"):
        native_linear.layers(half(4, 40), [tiles(40, 8)], [torch.ones(8)], [8], False)
    with pytest.raises(ValueError, match="AMX"):
        native_linear.weight_gradient(half(4, 8), half(4, 40), torch.ones(8, 40), torch.ones(8), False)
