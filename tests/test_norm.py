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
from linear_cases import assert_as_exact
from norm_cases import NATIVE, RAGGED, WIDTH, _fill_new_memory_with_nan, cast, make_inputs  # noqa: F401

DEPTH: dict[Level, int] = {"study": 1, "scan": 2, "slice": 3}  # how much of a label names a group
PAIRS = list(product(LEVELS, LEVELS))
SCALES = ["none", "path", "layer", "both"]


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
    assert_as_exact(
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
    assert_as_exact(ours, eager, exact)


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
        assert_as_exact(ours, eager, exact)
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
    assert_as_exact(ours, eager, exact)


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
    assert_as_exact(ours, eager, exact)


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
    assert_as_exact(ours, eager, exact)
    threads = torch.get_num_threads()
    try:
        for count in (2, 5):
            torch.set_num_threads(count)
            again = run(mixed, layout, src, dst, "native", RAGGED)
            assert all(torch.equal(value, again[name]) for name, value in ours.items())
    finally:
        torch.set_num_threads(threads)
