"""Norms between levels: strides, gradcheck, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hlip_kernels import Level, StudyLayout, add_regroup_norm
from hlip_kernels.layout import LEVELS
from hlip_kernels.native import native
from hlip_kernels.norm import _regroup
from norm_cases import NATIVE, RAGGED, WIDTH, _fill_new_memory_with_nan, cast, make_inputs  # noqa: F401

forward_op = torch.ops.hlip_kernels.add_regroup_norm.default
backward_op = torch.ops.hlip_kernels.add_regroup_norm_backward.default


def test_strided_vectors() -> None:
    layout = StudyLayout.from_grids(RAGGED, 2)
    inputs = cast(make_inputs(layout, "slice", "both"), torch.float32)
    strided = {
        name: x if x.dim() > 1 else torch.stack([x, torch.full_like(x, 1e9)], dim=1)[:, 0] for name, x in inputs.items()
    }
    strided["residual"] = inputs["residual"].T.contiguous().T
    for dst in LEVELS:
        plain, ours = (
            add_regroup_norm(**values, layout=layout, src="slice", dst=dst, backend="triton")
            for values in (inputs, strided)
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    inputs["path_scale"] = torch.full((1,), 0.5)
    whole = inputs | {"path_scale": torch.full((layout.num_groups("slice"),), 0.5)}
    one = inputs | {"path_scale": inputs["path_scale"].expand(layout.num_groups("slice"))}
    plain, ours = (
        add_regroup_norm(**values, layout=layout, src="slice", dst="scan", backend="triton") for values in (whole, one)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


@pytest.mark.parametrize(
    ("src", "dst", "update", "scales"),
    [("slice", "study", torch.bfloat16, "both"), ("scan", "scan", torch.float32, "none"),
     ("study", "scan", torch.float32, "path")],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
def test_opcheck(backend: str, src: Level, dst: Level, update: torch.dtype, scales: str) -> None:
    layout = StudyLayout.from_grids([[(2, 2, 2), (1, 2, 3)], [(1, 1, 2)]], 1)
    inputs = cast(make_inputs(layout, src, scales), torch.float32, update)
    names = ("residual", "update", "weight", "bias", "layer_scale", "path_scale")
    tensors = [inputs[n].requires_grad_(n != "path_scale") if n in inputs else None for n in names]
    regroup = _regroup(layout, src, dst)
    torch.library.opcheck(forward_op, (*tensors, *regroup, 1e-6, backend))
    with torch.no_grad():
        x, y, mean, rstd = forward_op(*tensors, *regroup, 1e-6, backend)
    _, update, weight, _, layer_scale, path_scale = (t if t is None else t.detach() for t in tensors)
    rest = (x, mean, rstd, update, path_scale, layer_scale, weight, *regroup, backend)
    torch.library.opcheck(backward_op, (torch.ones_like(x), torch.ones_like(y), *rest))
    torch.library.opcheck(backward_op, (None, torch.ones_like(y), *rest))


def test_gradcheck() -> None:
    layout = StudyLayout.from_grids([[(2, 1, 2), (1, 2, 1)]], 1)
    for src, dst in [("slice", "study"), ("study", "slice"), ("scan", "scan")]:
        inputs = make_inputs(layout, src, "both", width=4)  # type: ignore[arg-type]
        leaves = [inputs[n].requires_grad_() for n in ("residual", "update", "weight", "bias", "layer_scale")]

        def call(r: Tensor, u: Tensor, w: Tensor, b: Tensor, s: Tensor, src: Level = src, dst: Level = dst,
                 path: Tensor = inputs["path_scale"]) -> tuple[Tensor, Tensor]:  # type: ignore[assignment]  # fmt: skip
            return add_regroup_norm(r, u, layout, src, dst, w, b, 1e-3, path, s)

        assert torch.autograd.gradcheck(call, leaves)


def test_a_group_of_nan_leaves_the_others_exact() -> None:
    layout = StudyLayout.from_grids(RAGGED, 1)
    inputs = cast(make_inputs(layout, "slice", "none"), torch.float32)
    spoiled = {name: x.clone() for name, x in inputs.items()}
    spoiled["update"][: 2 * 10] = float("nan")  # the first scan: two slices of nine patches, each with a prefix row
    for backend in ("torch", "triton", *([] if native().reason else ["native"])):
        clean, dirty = (
            add_regroup_norm(**values, layout=layout, src="slice", dst="scan", backend=backend)
            for values in (inputs, spoiled)
        )
        others = torch.ones(len(clean[0]), dtype=torch.bool)
        others[: 1 + 18] = False
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a[others], b[others])
            assert b[~others].isnan().all()


def bad(name: str, value: Tensor | None = None, message: str = "") -> object:
    return pytest.param(name, value, message, id=f"{name}: {message}")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        bad("residual", torch.zeros(WIDTH), r"two tensors \(rows, width\) of one shape, got \(24,\)"),
        bad("residual", torch.zeros(117, WIDTH, dtype=torch.int32), "residual: expected floating-point"),
        bad("both", torch.zeros(3, WIDTH), "residual: expected 117 rows at level 'scan'"),
        bad("update", torch.zeros(117, 5), r"of one shape, got \(117, 24\) and \(117, 5\)"),
        bad("weight", torch.zeros(5), r"weight: expected floating-point \(24,\) on cpu, got torch.float32 \(5,\)"),
        bad("bias", torch.zeros(24, device="meta"), "bias: expected .* on cpu, got .* on meta"),
        bad("layer_scale", torch.zeros(24, dtype=torch.int64), "layer_scale: expected floating-point .* torch.int64"),
        bad("path_scale", torch.zeros(5, requires_grad=True), "path_scale: expected a constant"),
        bad("update", torch.zeros(117, 24).to(torch.float8_e4m3fn), "update: expected floating-point .* torch.float8"),
        bad("path_scale", torch.zeros(3), r"path_scale: expected floating-point \(5,\)"),
        bad("src", "patch", "level must be one of slice, scan, study, got 'patch'"),
        bad("dst", "patch", "level must be one of slice, scan, study, got 'patch'"),
        bad("backend", "flash", "unknown backend 'flash'; there are native, triton, torch"),
    ],
)
def test_bad_input(name: str, value: object, message: str) -> None:
    layout = StudyLayout.from_grids(RAGGED, 1)
    inputs: dict[str, object] = {**make_inputs(layout, "scan", "both"), "src": "scan", "dst": "study"}
    wrong = {"src": "patch", "dst": "patch", "backend": "flash"}.get(name, value)
    inputs |= dict.fromkeys(("residual", "update") if name == "both" else (name,), wrong)
    with pytest.raises(ValueError, match=message):
        add_regroup_norm(layout=layout, **inputs)  # type: ignore[arg-type]


def test_layout_on_another_device() -> None:
    layout = StudyLayout.from_grids(RAGGED, 1)
    inputs = make_inputs(layout, "scan", "none")
    with pytest.raises(ValueError, match="residual is on cpu, the layout on meta"):
        add_regroup_norm(**inputs, layout=layout.to("meta"), src="scan", dst="study")
    with pytest.raises(ValueError, match="'triton' cannot run here: needs float16"):
        add_regroup_norm(**inputs, layout=layout, src="scan", dst="study", backend="triton")
