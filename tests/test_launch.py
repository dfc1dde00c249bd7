"""The launches of the Triton kernels, as a card's driver would get them: grids, arguments, specialisation, devices.

They are made by `launch_job.py`, compiled for sm_90 in one process for all tests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_cuda as fake
from hlip_kernels.layout import LEVELS, Level

pytest.importorskip("triton")

import launch_job
from benchlib import machine_code
from benchlib.stub_driver import Launch, Memory
from hlip_kernels.backends import triton_norm
from launch_job import Attention, Norm, Run, layout

ARCHITECTURE = "sm_90"
MAPS = {"Tiles", "CuQueries", "CuKeys", "UsedQueries", "UsedKeys", "Fine", "Coarse", "Children", "Parents"}
VARYING = {"num_rows", "first_partial"}
STRIDES = {  # of attention: whose strides of rows and heads a kernel is told
    "stride_q": "Q", "stride_k": "K", "stride_do": "GradOut", "stride_dq": "GradQ", "stride_dk": "GradK",
    "stride_dv": "GradV",
}  # fmt: skip
BF16, FP32 = torch.bfloat16, torch.float32
Call = Callable[..., Any]


@contextmanager
def compiling(folder: Path) -> Iterator[None]:
    """Processes started here compile kernels, into this folder, and do not interpret them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def stub(cache: Path) -> Iterator[Call]:
    """`stub(function, *args)`: its result, from a process that has the stub driver."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with compiling(cache):
            pool.submit(launch_job.start, ARCHITECTURE).result()
        yield lambda function, *args: pool.submit(function, *args).result()


def lengths(level: Level, num_prefix: int) -> list[int]:
    return [int(n) + num_prefix for n in layout(num_prefix).seqlens(level)]


def num_tiles(rows_of_groups: list[int], rows: int) -> int:
    return sum(-(-n // rows) for n in rows_of_groups)


def check(run: Run) -> None:
    """Every launch got the tensors that it should, wholly in their memory, and was compiled for what they are."""
    for launch in run.launches:
        for name, value in launch.args.items():
            if isinstance(value, Memory):
                check_memory(launch, name, value)
            if isinstance(value, int) and (name == "P" or name.startswith("stride_")):
                assert (name in launch.constants) == (value == 1), (launch.name, name, value)
                assert (name in launch.divisible) == (value % 16 == 0), (launch.name, name, value)
        assert not launch.divisible & (MAPS | VARYING) and not launch.constants.keys() & VARYING
        assert launch.options["enable_fp_fusion"] and launch.options["shared"] <= 232448
        assert launch.device == 0 and launch.stream == 1000


def check_memory(launch: Launch, name: str, x: Memory) -> None:
    where = launch.name, name
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.strides, strict=True))
    assert x.begin <= x.address and x.address + extent * x.dtype.itemsize <= x.end, where
    assert (name in launch.divisible) == (x.address % 16 == 0 and name not in MAPS), where


def check_given(run: Run, launch: Launch, names: set[str], own: set[str]) -> None:
    """A launch's tensors are those of the call of these names, and own ones; any other is absent."""
    tensors = {name for name, value in launch.args.items() if isinstance(value, Memory)}
    assert tensors == names | own, launch.name
    for name in names:
        assert launch.args[name] == run.given[name], (launch.name, name)


def check_attention(run: Run, case: Attention, q_lengths: list[int], k_lengths: list[int], tensors: set[str]) -> None:
    """tensors: further ones that every kernel is given."""
    check(run)
    assert [launch.name for launch in run.launches] == ["attention_forward", "attention_dq", "attention_dkdv"]
    forward, dq, dkdv = run.launches
    tensors = tensors | {"Q", "K", "V", "CuQueries", "CuKeys"}
    check_given(run, forward, tensors | {"Out", "Lse"}, {"Tiles"})
    check_given(run, dq, tensors | {"Out", "Lse", "GradOut", "GradQ"}, {"Tiles", "Stats"})
    check_given(run, dkdv, tensors | {"GradOut", "GradK", "GradV"}, {"Tiles", "Stats"})
    num_rows = run.given["Q"].shape[0]
    assert dq.args["Stats"] == dkdv.args["Stats"]
    assert dq.args["Stats"].shape == (case.heads, num_rows, 2) and dq.args["Stats"].dtype == FP32
    for launch in run.launches:
        own, rows_of = ("keys", k_lengths) if launch is dkdv else ("queries", q_lengths)
        rows = launch.constants["ROWS"]
        assert launch.args["Tiles"] == run.given[f"{own} {rows}"]
        assert launch.grid == (num_tiles(rows_of, rows), case.heads, 1)
        assert (launch.args["H"], launch.args["D"], launch.args["num_rows"]) == (case.heads, case.head_dim, num_rows)
        for name, tensor in STRIDES.items():
            if name in launch.args:
                strides = launch.args[name], launch.args[f"{name}_head"], 1
                assert strides == launch.args[tensor].strides, (launch.name, name)
        assert launch.args["K"].strides == launch.args["V"].strides
        for name in {"Out", "Lse", "Stats"} & launch.args.keys():
            assert_contiguous(launch.args[name])


def assert_contiguous(x: Memory) -> None:
    assert x.strides == torch.empty(x.shape, device="meta").stride()


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_attention_is_launched_on_its_tensors(stub: Call, dtype: torch.dtype, num_prefix: int) -> None:
    for level in LEVELS:
        case = Attention(dtype, level, num_prefix)
        rows = lengths(level, num_prefix)
        check_attention(stub(launch_job.attend, case), case, rows, rows, set())


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 80), (1, 96)])
def test_attention_of_other_heads(stub: Call, heads: int, head_dim: int) -> None:
    case = Attention(heads=heads, head_dim=head_dim)
    rows = lengths("scan", 1)
    check_attention(stub(launch_job.attend, case), case, rows, rows, set())


@pytest.mark.parametrize("num_prefix", [0, 3])
def test_queries_of_their_own_are_launched_with_the_rows_in_use(stub: Call, num_prefix: int) -> None:
    case = Attention(num_prefix=num_prefix, heads=3)
    run = stub(launch_job.attend_apart, case)
    check_attention(run, case, [3, 1, 0, 40], [70, 1, 7, 130], {"UsedKeys"})
    assert run.given["K"].shape[0] == run.given["V"].shape[0] == 208 + 3 * num_prefix


def test_what_kernels_cannot_read_is_copied(stub: Call) -> None:
    """They are told one set of strides for keys and values, and take the values of a row to be next to one another."""
    run = stub(launch_job.attend_unlike, Attention())
    check(run)
    assert run.given["Q"].strides == (128, 1, 2) and run.given["V"].strides == (512, 64, 1)
    for launch in run.launches:
        for name, stride in (("Q", "stride_q"), ("K", "stride_k"), ("V", "stride_k")):
            strides = launch.args[stride], launch.args[f"{stride}_head"], 1
            assert launch.args[name].strides == strides == (128, 64, 1), (launch.name, name)
    _, dq, dkdv = run.launches
    assert dq.args["GradQ"] == run.given["GradQ"]
    assert (dkdv.args["GradK"], dkdv.args["GradV"]) == (run.given["GradK"], run.given["GradV"])


@pytest.mark.parametrize("rows_of_groups", [[], [0, 0]])
def test_nothing_is_launched_for_nothing(stub: Call, rows_of_groups: list[int]) -> None:
    assert stub(launch_job.attend_lengths, rows_of_groups, Attention()).launches == []
    assert stub(launch_job.normalise_nothing, Norm()).launches == []


def test_grid_limits(stub: Call) -> None:
    """CUDA takes 2^31 - 1 programs in x, and 65535 in y, where heads are."""
    run = stub(launch_job.attend_singly, 10**6)
    assert [launch.grid for launch in run.launches] == [(10**6, 1, 1)] * 3
    most = Attention(heads=65535, head_dim=16)
    assert [launch.grid for launch in stub(launch_job.attend_lengths, [1], most).launches] == [(1, 65535, 1)] * 3
    with pytest.raises(ValueError, match="65535 heads, got 65536"):
        stub(launch_job.attend_lengths, [1], most._replace(heads=65536))


def loads(launch: Launch) -> set[str]:
    """The bits of loads from global memory and of asynchronous copies; empty for 32."""
    return set(re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.BYPASS)?\.?(\w*)", machine_code.sass(launch.cubin)))


@pytest.mark.parametrize(("offset", "gap"), [(0, 0), (8, 0), (1, 0), (0, 8)])
def test_attention_is_compiled_for_the_alignment_there_is(stub: Call, offset: int, gap: int) -> None:
    """A card faults on a load of 16 bytes at an address that is not a multiple of 16."""
    case = Attention(offset=offset, gap=gap)
    run = stub(launch_job.attend, case)
    rows = lengths("scan", 1)
    check_attention(run, case, rows, rows, set())
    forward = run.launches[0]
    assert ({"Q", "K", "V"} <= forward.divisible) == (offset % 8 == 0)
    assert ({"stride_q", "stride_k"} <= forward.divisible) == (gap == 0)
    assert loads(forward) == ({"", "128"} if offset % 8 == gap == 0 else {"", "U16"})


def check_norm(run: Run, case: Norm) -> None:
    check(run)
    fine, coarse = sorted((case.src, case.dst), key=LEVELS.index)
    same, coarser = case.src == case.dst, case.dst == coarse
    tiles = num_tiles(lengths(fine, case.num_prefix), triton_norm.ROWS)
    families = 0 if same else layout(0).num_groups(coarse) * case.num_prefix
    names = ["norm_forward"]
    if families:
        names = (["prefix_forward"] if coarser else []) + ["norm_forward", "prefix_backward"]
    names.append("norm_backward")
    assert [launch.name for launch in run.launches] == names
    scales = {name for name, given in (("PathScale", case.path), ("LayerScale", case.layer)) if given}
    kept = {"Update"} if case.layer else set()
    split = {"GradUpdate"} if scales or case.dtype != case.update_dtype else set()
    for launch in run.launches:
        prefix, backward = launch.name.startswith("prefix"), launch.name.endswith("backward")
        tensors = {"X", "Mean", "Rstd", "Weight", "Fine"} | scales
        tensors |= (
            {"GradX", "GradY", "GradResidual"} | kept | split if backward else {"Residual", "Update", "Bias", "Y"}
        )
        tensors |= {"Coarse", "Children"} if prefix else {"Tiles"} if same else {"Tiles", "Parents"}
        if launch.name == "norm_forward":
            tensors |= {"Coarse"}
        check_given(run, launch, tensors, {"Partials"} if backward else set())
        assert launch.grid == (families if prefix else tiles, 1, 1)
        assert (launch.args["C"], launch.args["P"]) == (case.width, case.num_prefix)
        assert launch.constants.get("COARSER", True) == (coarser and not same)
        for value in launch.args.values():
            if isinstance(value, Memory):
                assert_contiguous(value)
        if backward:
            assert launch.args["Partials"].shape == (tiles + families, 3 if case.layer else 2, case.width)
            assert launch.args.get("first_partial", tiles) == tiles


@pytest.mark.parametrize(
    ("dtype", "update_dtype", "num_prefix", "path", "layer"),
    [
        (BF16, BF16, 1, False, False),
        (FP32, BF16, 1, True, True),
        (FP32, FP32, 3, True, False),
        (BF16, BF16, 0, False, True),
        (FP32, BF16, 3, False, False),
    ],
)
def test_norm_is_launched_on_its_tensors(
    stub: Call, dtype: torch.dtype, update_dtype: torch.dtype, num_prefix: int, path: bool, layer: bool
) -> None:
    for src, dst in product(LEVELS, LEVELS):
        case = Norm(dtype, update_dtype, src, dst, num_prefix, path, layer)
        check_norm(stub(launch_job.normalise, case), case)


@pytest.mark.parametrize("offset", [0, 1])
def test_norm_is_compiled_for_the_alignment_there_is(stub: Call, offset: int) -> None:
    case = Norm(src="scan", offset=offset)
    run = stub(launch_job.normalise, case)
    check_norm(run, case)
    forward = run.launches[0]
    assert ({"Residual", "Update"} <= forward.divisible) == (offset == 0)
    assert loads(forward) == {"", "128", "64" if offset == 0 else "U16"}  # 128 are of weights, in float32


def specialisation(launch: Launch) -> tuple[Any, ...]:
    """All that a kernel is compiled for, and its code, which depends on types, too."""
    return launch.name, launch.divisible, frozenset(launch.constants.items()), launch.cubin


MIXES = [
    [[(1, 2, 1)], [(2, 1, 1), (1, 1, 1)]],
    [[(6, 14, 14)] * 2, [(2, 5, 7)]],
    [[(16, 4, 4)] * 16],
    [[(2, 8, 8)] * 8] * 2,
    [[(3, 3, 3), (1, 1, 1)]],
    [[(3, 3, 3)], [(2, 2, 2)]],  # as many scans as studies
    [[(1, 3, 3)], [(1, 2, 2)]],  # as many slices, too
]


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_mixes_of_studies_share_compiled_kernels(stub: Call, num_prefix: int) -> None:
    """Numbers of rows, groups and tiles of 1, or divisible by 16, are not compiled for."""
    first, *others = (set(map(specialisation, run)) for run in stub(launch_job.train, MIXES, num_prefix))
    assert len(first) == (12 if num_prefix else 9)  # 3 of attention, 2, 4 and 3 of norms: to the same, up, down
    assert all(kernels == first for kernels in others)


def test_launches_go_to_the_device_of_the_tensors(cache: Path, tmp_path: Path) -> None:
    """Triton launches on the current device, and on its current stream."""
    if reason := fake.why_not():
        pytest.skip(reason)
    with fake.guarded_process(tmp_path) as call:
        with compiling(cache):
            call(launch_job.start, ARCHITECTURE)
        for device, (function, case) in product(
            (1, 0), ((launch_job.attend, Attention()), (launch_job.normalise, Norm()))
        ):
            launches = call(function, case._replace(device=f"cuda:{device}")).launches
            assert len(launches) == (3 if function is launch_job.attend else 4)
            for launch in launches:
                tensors = [value.device for value in launch.args.values() if isinstance(value, Memory)]
                assert set(tensors) == {torch.device("cuda", device)}
                assert (launch.device, launch.stream) == (device, 1000 + device)
            assert call(launch_job.current_device) == 0
