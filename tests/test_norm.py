"""Residual add, regroup and LayerNorm in one op, against the formula written out in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from conftest import token_labels
from hlip_kernels import Grid, Level, StudyLayout, add_regroup_norm
from hlip_kernels import native as library
from hlip_kernels.layout import LEVELS
from hlip_kernels.native import ISAS, Native, native
from hlip_kernels.norm import _regroup

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native().reason), reason=native().reason))
forward_op = torch.ops.hlip_kernels.add_regroup_norm.default
backward_op = torch.ops.hlip_kernels.add_regroup_norm_backward.default

RAGGED: list[list[Grid]] = [[(2, 3, 3), (3, 2, 7)], [(1, 2, 2)], [(2, 3, 4)] * 2]
DEPTH: dict[Level, int] = {"study": 1, "scan": 2, "slice": 3}  # how much of a label names a group
PAIRS = list(product(LEVELS, LEVELS))
WIDTH = 24
SCALES = ["none", "path", "layer", "both"]


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan() -> object:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def names_of(grids: list[list[Grid]], level: Level) -> list[tuple[int, ...]]:
    """The groups of a level in order, each by its label."""
    return sorted({label[: DEPTH[level]] for label in token_labels(grids)})


def patches_of(grids: list[list[Grid]], level: Level) -> dict[tuple[int, ...], list[int]]:
    """The patches of each group, by its name: their numbers in the stream."""
    labels = [label[: DEPTH[level]] for label in token_labels(grids)]
    return {name: [t for t, label in enumerate(labels) if label == name] for name in names_of(grids, level)}


def formula(
    inputs: dict[str, Tensor], grids: list[list[Grid]], num_prefix: int, src: Level, dst: Level
) -> list[Tensor]:
    """The residual and the normalised rows, one group at a time."""
    before, after = patches_of(grids, src), patches_of(grids, dst)
    groups = [g for g, patches in enumerate(before.values()) for _ in range(num_prefix + len(patches))]
    update = inputs["update"] * inputs["layer_scale"] if "layer_scale" in inputs else inputs["update"]
    if "path_scale" in inputs:
        update = update * inputs["path_scale"][groups][:, None]
    x = inputs["residual"] + update
    own, stream = {}, {}
    runs = x.split([num_prefix + len(patches) for patches in before.values()])
    for (name, patches), rows in zip(before.items(), runs, strict=True):
        own[name] = rows[:num_prefix]
        stream.update(zip(patches, rows[num_prefix:], strict=True))
    short = min(DEPTH[src], DEPTH[dst])
    moved = []
    for name, patches in after.items():
        moved.append(torch.stack([own[o] for o in before if o[:short] == name[:short]]).mean(0))
        moved.append(torch.stack([stream[t] for t in patches]))
    result = torch.cat(moved)
    return [result, F.layer_norm(result, result.shape[1:], inputs["weight"], inputs["bias"], 1e-6)]


def make_inputs(layout: StudyLayout, src: Level, scales: str, seed: int = 0, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    groups = layout.num_groups(src)
    rows = layout.num_rows(src)
    inputs = {"residual": draw(rows, width), "update": draw(rows, width), "weight": draw(width), "bias": draw(width)}
    if scales in ("path", "both"):
        inputs["path_scale"] = (torch.rand(groups, generator=generator) < 0.6).double() / 0.6
    if scales in ("layer", "both"):
        inputs["layer_scale"] = draw(width)
    return inputs


def run(inputs: dict[str, Tensor], layout: StudyLayout, src: Level, dst: Level, backend: str | None,
        grids: list[list[Grid]], use: str = "xy") -> dict[str, Tensor]:  # fmt: skip
    """Both results and all gradients; of the formula if no backend is named."""
    leaves = {name: x.clone().requires_grad_(name != "path_scale") for name, x in inputs.items()}
    if backend is None:
        x, y = formula(leaves, grids, layout.num_prefix, src, dst)
    else:
        x, y = add_regroup_norm(**leaves, layout=layout, src=src, dst=dst, backend=backend)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    loss = sum((out.double() * w).sum() for out, w, name in zip((x, y), weights, "xy", strict=True) if name in use)
    wanted = [name for name in leaves if name != "path_scale"]
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True)
    results = {"x": x.detach(), "y": y.detach()}
    return results | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype, update: torch.dtype | None = None) -> dict[str, Tensor]:
    kinds = {"update": update or dtype, "path_scale": torch.float32}
    return {name: x.to(kinds.get(name, dtype)) for name, x in inputs.items()}


def assert_close_to_oracle(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error at most 2x (results) or 3x (gradients) that of eager PyTorch, plus one rounding."""
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        errors = [float((x.double() - exact[name]).abs().max()) for x in (value, eager[name])]
        rounding = torch.finfo(value.dtype).eps * float(exact[name].abs().max())
        assert errors[0] <= (3 if name.startswith("d") else 2) * errors[1] + rounding, (name, errors, rounding)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_torch_equals_the_formula(src: Level, dst: Level, num_prefix: int, scales: str) -> None:
    layout = StudyLayout.from_grids(RAGGED, num_prefix)
    inputs = make_inputs(layout, src, scales)
    ours, expected = (run(inputs, layout, src, dst, backend, RAGGED) for backend in ("torch", None))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, msg=name)


MIXED = [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
KERNELS = [
    *(("triton", *dtypes) for dtypes in [*MIXED, ("float16", "float16")]),
    *(
        pytest.param(*NATIVE.values, *dtypes, marks=NATIVE.marks)
        for dtypes in [*MIXED, ("bfloat16", "float32"), ("float32", "float16")]
    ),
]


@pytest.mark.parametrize(("backend", "residual", "update"), KERNELS)
@pytest.mark.parametrize("scales", ["none", "both"])
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_kernels_are_as_exact_as_eager(
    src: Level, dst: Level, scales: str, backend: str, residual: str, update: str
) -> None:
    layout = StudyLayout.from_grids(RAGGED, 2)
    inputs = cast(make_inputs(layout, src, scales), getattr(torch, residual), getattr(torch, update))
    exact = {name: x.double() for name, x in inputs.items()}
    assert_close_to_oracle(
        run(inputs, layout, src, dst, backend, RAGGED),
        run(inputs, layout, src, dst, "torch", RAGGED),
        run(exact, layout, src, dst, None, RAGGED),
    )


LONG: list[list[Grid]] = [[(2, 5, 8), (1, 1, 3)], [(1, 7, 10)]]  # groups of several tiles


@pytest.mark.parametrize(
    ("backend", "num_prefix"),
    [*(("triton", n) for n in (0, 1, 5, 32)), *(pytest.param("native", n, marks=NATIVE.marks) for n in (0, 1, 5, 32))],
)
@pytest.mark.parametrize(("src", "dst"), PAIRS)
def test_kernels_with_any_number_of_prefix_rows(src: Level, dst: Level, backend: str, num_prefix: int) -> None:
    """With 32, the first tile of a group has no patch."""
    layout = StudyLayout.from_grids(LONG, num_prefix)
    inputs = make_inputs(layout, src, "both")
    exact = run(inputs, layout, src, dst, None, LONG)
    single = cast(inputs, torch.float32)
    ours, eager = (run(single, layout, src, dst, name, LONG) for name in (backend, "torch"))
    assert_close_to_oracle(ours, eager, exact)


@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize(
    "grids",
    [[[(1, 2, 3)], [(1, 1, 10)]], [[(3, 2, 2)], [(2, 1, 5)]], [[(1, 2, 2)] * 3], [[(1, 1, 1)]]],
    ids=["all levels are one", "scans are studies", "slices are scans", "one patch"],
)
def test_levels_with_as_many_groups(grids: list[list[Grid]], num_prefix: int, backend: str) -> None:
    """Every mean is of one row, and rows stay where they are."""
    layout = StudyLayout.from_grids(grids, num_prefix)
    for src, dst in PAIRS:
        inputs = make_inputs(layout, src, "both")
        exact = run(inputs, layout, src, dst, None, grids)
        single = cast(inputs, torch.float32)
        ours, eager = (run(single, layout, src, dst, name, grids) for name in (backend, "torch"))
        assert_close_to_oracle(ours, eager, exact)
        if layout.num_groups(src) == layout.num_groups(dst):
            assert torch.equal(ours["x"], run(single, layout, src, src, backend, grids)["x"])


@pytest.mark.parametrize("use", ["x", "y"])
@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
@pytest.mark.parametrize(("src", "dst"), [("slice", "study"), ("scan", "scan"), ("study", "scan")])
def test_gradients_through_one_of_the_results(src: Level, dst: Level, backend: str, use: str) -> None:
    layout = StudyLayout.from_grids(RAGGED, 1)
    inputs = make_inputs(layout, src, "both")
    exact = run(inputs, layout, src, dst, None, RAGGED, use)
    single = cast(inputs, torch.float32)
    ours, eager = (run(single, layout, src, dst, name, RAGGED, use) for name in (backend, "torch"))
    if use == "x":  # the norm's parameters took no part
        assert not ours.pop("dweight").any()
        assert not ours.pop("dbias").any()
        del eager["dweight"], eager["dbias"]
    assert_close_to_oracle(ours, eager, exact)


GRIDS = st.lists(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 12)), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["triton", "torch" if native().reason else "native"]), GRIDS, st.sampled_from(PAIRS),
    st.integers(0, 4), st.sampled_from(SCALES), st.integers(24, 70),
)  # fmt: skip
def test_random_layouts(
    backend: str, grids: list[list[Grid]], levels: tuple[Level, Level], num_prefix: int, scales: str, width: int
) -> None:
    layout = StudyLayout.from_grids(grids, num_prefix)
    inputs = make_inputs(layout, levels[0], scales, width=width)
    exact = run(inputs, layout, *levels, None, grids)
    single = cast(inputs, torch.float32)
    ours, eager = (run(single, layout, *levels, name, grids) for name in (backend, "torch"))
    assert_close_to_oracle(ours, eager, exact)


@pytest.mark.parametrize("backend", ["torch", "triton", NATIVE])
@pytest.mark.parametrize(
    ("src", "dst"), [("slice", "study"), ("study", "slice"), ("scan", "scan"), ("scan", "study"), ("study", "scan")]
)
@pytest.mark.parametrize("grids", [[(2, 3, 4)] * 2, [(3, 3, 4)]], ids=["two scans", "one scan"])
def test_a_study_alone_is_bitwise_the_study_in_a_batch(grids: list[Grid], src: Level, dst: Level, backend: str) -> None:
    """One scan a study makes as many groups of either level, of which one is the coarser all the same."""
    batch = StudyLayout.from_grids([*RAGGED, grids], 2)
    alone = StudyLayout.from_grids([grids], 2)
    inputs = cast(make_inputs(batch, src, "path"), torch.float32)

    def last(level: Level) -> Tensor:
        """The rows of the last study."""
        return torch.arange(batch.num_rows(level) - alone.num_rows(level), batch.num_rows(level))

    rows = {"residual": last(src), "update": last(src), "path_scale": torch.arange(batch.num_groups(src))}
    rows["path_scale"] = rows["path_scale"][-alone.num_groups(src) :]
    part = {name: x[rows[name]] if name in rows else x for name, x in inputs.items()}
    grads = [torch.randn(batch.num_rows(dst), WIDTH) for _ in range(2)]

    def results(values: dict[str, Tensor], layout: StudyLayout, rows: slice | Tensor) -> list[Tensor]:
        leaves = {**values, "residual": values["residual"].clone().requires_grad_()}
        leaves["update"] = values["update"].clone().requires_grad_()
        x, y = add_regroup_norm(**leaves, layout=layout, src=src, dst=dst, backend=backend)
        wanted = [leaves["residual"], leaves["update"]]
        return [x, y, *torch.autograd.grad((x, y), wanted, [g[rows] for g in grads])]

    everything = slice(None)
    by_itself = results(part, alone, last(dst))
    together, again = (results(inputs, batch, everything) for _ in range(2))
    for a, b, c, level in zip(together, by_itself, again, (dst, dst, src, src), strict=True):
        assert torch.equal(a[last(level)], b)
        assert torch.equal(a, c)


@pytest.mark.skipif(bool(native().reason), reason=native().reason)
@pytest.mark.parametrize("isa", ISAS[: ISAS.index(native().isa) + 1] if native().isa else ())
@pytest.mark.parametrize(("src", "dst"), [("slice", "study"), ("study", "slice"), ("scan", "scan")])
@pytest.mark.parametrize("width", [7, 40, 5000])
def test_every_instruction_set_is_as_exact_and_repeatable_for_any_number_of_threads(
    width: int, src: Level, dst: Level, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Native(native().library, isa, "")
    monkeypatch.setattr(library, "native", lambda: found)
    layout = StudyLayout.from_grids(RAGGED, 2)
    inputs = make_inputs(layout, src, "both", width=width)
    exact = run(inputs, layout, src, dst, None, RAGGED)
    mixed = cast(inputs, torch.float32, torch.bfloat16)
    ours, eager = (run(mixed, layout, src, dst, backend, RAGGED) for backend in ("native", "torch"))
    assert_close_to_oracle(ours, eager, exact)
    threads = torch.get_num_threads()
    try:
        for count in (2, 5):
            torch.set_num_threads(count)
            again = run(mixed, layout, src, dst, "native", RAGGED)
            assert all(torch.equal(value, again[name]) for name, value in ours.items())
    finally:
        torch.set_num_threads(threads)


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
