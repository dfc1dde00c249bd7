"""What the Triton kernels ask of memory, seen through the interpreter: every address, and the bytes in all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hlip_kernels import Level, StudyLayout
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import Regroup, Spans
from hlip_kernels.layout import LEVELS
from hlip_kernels.tiles import attention_config
from spans import check_few_queries, plain_spans

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from benchlib.io_complexity import watched
from hlip_kernels.backends import triton_attention, triton_norm

HEADS = 2
KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")


def closed_form(queries: Spans, keys: Spans, head_dim: int, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Bytes (loaded, stored) of each kernel, by the number of tiles that cover the queries, or the keys, of each group.

    A tile's program reads its map entry, and a begin and an end of the group's queries and of its keys (24 bytes), and
    streams two rows of D values for each of the group's keys. That of dkdv streams them for each query, with two
    statistics of 4 bytes, which dq writes.
    """
    row = head_dim * dtype.itemsize
    config = attention_config("sm_80", dtype, head_dim)
    total = {name: np.zeros(2, dtype=int) for name in KERNELS}
    lengths = (map(int, x.cu_seqlens.diff() if x.seqused is None else x.seqused) for x in (queries, keys))
    for q, k in zip(*lengths, strict=True):
        forward, dq, dkdv = (-(-n // tile.rows) for n, tile in zip((q, q, k), vars(config).values(), strict=True))
        total["attention_forward"] += q * row + forward * (2 * k * row + 24), q * (row + 4)
        total["attention_dq"] += q * (3 * row + 4) + dq * (2 * k * row + 24), q * (row + 8)
        total["attention_dkdv"] += k * 2 * row + dkdv * (q * (2 * row + 8) + 24), k * 2 * row
    return {name: (HEADS * int(loaded), HEADS * int(stored)) for name, (loaded, stored) in total.items()}


def assert_bytes_are_the_closed_form(queries: Spans, keys: Spans, head_dim: int, dtype: torch.dtype) -> None:
    """Rows of queries and of keys are slots of packed tensors, with rows in front that are in no group."""
    generator = torch.Generator().manual_seed(0)
    front = 3
    rows = [front + int(spans.cu_seqlens[-1]) for spans in (queries, keys)]
    q = torch.randn(rows[0], 3, HEADS, head_dim, generator=generator).to(dtype)[front:, 0]
    k, v = torch.randn(rows[1], 2, HEADS, head_dim, generator=generator).to(dtype)[front:].unbind(1)
    triton, settings = BACKENDS["triton"], (queries, keys, 0.25)
    with watched() as traffic:
        out, lse = triton.forward(q, k, v, *settings)
        grads = torch.empty_like(q), *torch.empty(len(k), 2, HEADS, head_dim, dtype=dtype).unbind(1)
        triton.backward(grads, torch.ones_like(out), q, k, v, out, lse, *settings, True)
    seen = {name: (counts.loaded, counts.stored) for name, counts in traffic.kernels.items()}
    assert seen == closed_form(queries, keys, head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("lengths", "num_prefix", "head_dim"),
    [([0, 1, 63, 64, 65, 150], 1, 32), ([0, 30, 130], 0, 16), ([70, 5], 17, 80)],
)
def test_every_address_is_inside_and_bytes_are_the_closed_form(
    lengths: list[int], num_prefix: int, head_dim: int, dtype: torch.dtype
) -> None:
    spans = plain_spans(lengths, num_prefix)
    assert_bytes_are_the_closed_form(spans, spans, head_dim, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("used", [False, True])
def test_bytes_of_queries_and_keys_of_different_lengths(used: bool, dtype: torch.dtype) -> None:
    queries, keys = (3, 0, 150, 40), (70, 7, 0, 130)
    rest = [n // 2 for n in keys] if used else None
    assert_bytes_are_the_closed_form(plain_spans(queries), plain_spans(keys, 0, rest), 32, dtype)


def test_every_address_of_few_queries_is_inside() -> None:
    with watched() as traffic:
        check_few_queries(BACKENDS["triton"], torch.float32)
    assert set(traffic.kernels) == set(KERNELS)


@pytest.mark.parametrize("level", ["slice", "scan", "study"])
def test_bytes_of_each_level(level: Level) -> None:
    layout = StudyLayout.from_grids([[(2, 5, 7), (3, 4, 4)], [(1, 6, 6)]])
    spans = Spans(layout.cu_seqlens(level), layout.tiles(level), layout.max_seqlen(level))
    assert_bytes_are_the_closed_form(spans, spans, 16, torch.float32)


def addresses_only(monkeypatch: pytest.MonkeyPatch, real: list[torch.Tensor]) -> list[np.ndarray]:
    """From here on kernels touch no memory but that of `real`; the list returned gets all other addresses."""
    seen: list[np.ndarray] = []
    real_load = InterpreterBuilder.create_masked_load
    ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in real]

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        address = pointers.data.astype(np.uint64)
        if any(start <= int(address.min()) < end for start, end in ranges):
            return real_load(self, pointers, mask, *rest)
        seen.append(address[mask.data.astype(bool)])
        return TensorHandle(np.zeros(address.shape, dtype=np.float32), pointers.get_element_ty())

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        seen.append(pointers.data.astype(np.uint64)[mask.data.astype(bool)])

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store)
    return seen


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys that begin two thousand million rows into their tensors: addresses, without the memory."""
    q_begin, k_begin, num_q, num_k, head_dim = 2_000_000_000, 2_100_000_000, 90, 150, 32
    q_bounds, k_bounds = (torch.tensor([a, a + n], dtype=torch.int32) for a, n in ((q_begin, num_q), (k_begin, num_k)))
    q_tile, k_tile = (torch.tensor([[0, first]], dtype=torch.int32) for first in (64, 128))
    seen = addresses_only(monkeypatch, [q_bounds, k_bounds, q_tile, k_tile])
    packed, grads = torch.zeros(2, 2, 3, HEADS, head_dim).unbind(0)
    q, k, v = packed.unbind(1)
    dq, dk, dv = grads.unbind(1)
    out, grad_out = torch.zeros(2, 2, HEADS, head_dim).unbind(0)
    lse, stats = torch.zeros(HEADS, 2), torch.zeros(HEADS, 2, 2)
    num_rows = q_begin + num_q
    spans, constants = (q_bounds, k_bounds, None, None), {"H": HEADS, "D": head_dim, "BLOCK_D": 32, "ROWS": 64}

    def run(kernel: Any, *args: Any) -> np.ndarray:
        seen.clear()
        kernel[(1, HEADS)](*args, **constants, STREAMED=32, PRECISION="ieee")
        return np.unique(np.concatenate(seen))

    def rows(x: torch.Tensor, begin: int, end: int) -> np.ndarray:
        """Addresses of rows of x (R, H, D), if it had that many."""
        columns = np.arange(HEADS)[:, None] * x.stride(1) + np.arange(head_dim)
        return x.data_ptr() + 4 * (np.arange(begin, end)[:, None] * x.stride(0) + columns.ravel())

    def statistics(x: torch.Tensor, begin: int, end: int) -> np.ndarray:
        """The same of x (H, R) or (H, R, 2)."""
        size = x.nbytes // (2 * HEADS)
        at = np.arange(HEADS)[:, None] * num_rows + np.arange(begin, end)
        return x.data_ptr() + (at[..., None] * size + 4 * np.arange(size // 4))

    def assert_all(addresses: np.ndarray, *expected: np.ndarray) -> None:
        assert np.array_equal(addresses, np.unique(np.concatenate([x.ravel() for x in expected])).astype(np.uint64))

    own_q, all_q = (q_begin + 64, q_begin + num_q), (q_begin, q_begin + num_q)
    own_k, all_k = (k_begin + 128, k_begin + num_k), (k_begin, k_begin + num_k)
    strides = [x.stride(i) for x in (q, k) for i in (0, 1)]
    in_backward = [*strides, *grad_out.stride()[:2], *dq.stride()[:2]]
    streamed = rows(k, *all_k), rows(v, *all_k)

    addresses = run(triton_attention.attention_forward, q, k, v, out, lse, q_tile, *spans, *strides, num_rows, 0.25)
    assert_all(addresses, rows(q, *own_q), *streamed, rows(out, *own_q), statistics(lse, *own_q))
    assert int(addresses.max()) - q.data_ptr() > 2**31

    tensors = q, k, v, out, grad_out, lse, stats, dq
    addresses = run(triton_attention.attention_dq, *tensors, q_tile, *spans, *in_backward, num_rows, 0.25, 0.25)
    own = [rows(x, *own_q) for x in (q, out, grad_out, dq)] + [statistics(x, *own_q) for x in (lse, stats)]
    assert_all(addresses, *own, *streamed)

    tensors = q, k, v, grad_out, stats, dk, dv
    in_backward += dv.stride()[:2]
    addresses = run(triton_attention.attention_dkdv, *tensors, k_tile, *spans, *in_backward, num_rows, 0.25, 0.25)
    own = [rows(x, *own_k) for x in (k, v, dk, dv)]
    assert_all(addresses, *own, rows(q, *all_q), rows(grad_out, *all_q), statistics(stats, *all_q))


@pytest.mark.parametrize("coarser", [None, False, True])
def test_offsets_of_the_norm_beyond_32_bits(coarser: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine groups of 40 rows far along their tensor, and their coarse one, which begins elsewhere; None: one level."""
    start, length, num_prefix, width, family = 2_000_000_000, 40, 3, 16, 5
    elsewhere = start - 10_000
    fine = torch.arange(start, start + family * length + 1, length, dtype=torch.int32)
    coarse = torch.tensor([elsewhere, elsewhere + 500], dtype=torch.int32)
    tile, children = torch.tensor([[0, 0]], dtype=torch.int32), torch.tensor([0, family], dtype=torch.int32)
    parents = None if coarser is None else torch.zeros(family, dtype=torch.int32)
    seen = addresses_only(monkeypatch, [fine, coarse, tile, children, *([] if parents is None else [parents])])
    x, statistics = torch.zeros(4, width), torch.zeros(4)
    forward = x, x, None, None, x, x, x, x, statistics, statistics
    backward = x, x, x, statistics, statistics, None, None, None, x, x, x, x

    def rows_of(kernel: Any, *arguments: Any, **constants: Any) -> np.ndarray:
        """The rows that are read or written, of tensors and of statistics; those of parameters and sums are 0 to 3."""
        seen.clear()
        kernel[(1,)](*arguments, C=width, BLOCK_C=16, **constants)
        addresses = np.unique(np.concatenate(seen)).astype(np.int64)
        rows = (addresses - x.data_ptr()) // (4 * width)
        of_statistics = (addresses - statistics.data_ptr()) // 4
        assert abs(x.data_ptr() - statistics.data_ptr()) < 2**40
        return np.unique(np.where(np.isin(of_statistics, legal), of_statistics, rows))

    own, prefix = np.arange(start, start + length), elsewhere + np.arange(num_prefix)
    patches = own if coarser is None else own[num_prefix:]
    legal = np.concatenate([own, prefix, fine[:-1].numpy().astype(np.int64)])
    settings: dict[str, Any] = {"COARSER": bool(coarser), "ROWS": 64}
    parameters = np.arange(2)
    rows = rows_of(triton_norm.norm_forward, *forward, tile, fine, coarse, parents, num_prefix, 1e-6, **settings)
    clones = [own, prefix] if coarser is False else [patches]
    assert set(rows) - set(parameters) == set(np.concatenate(clones))
    rows = rows_of(triton_norm.norm_backward, *backward, tile, fine, parents, num_prefix, **settings)
    assert set(rows) - set(parameters) == set(patches)
    if coarser is None:
        return
    relatives = {elsewhere, *fine[:-1].tolist()}  # the first prefix row of the coarse group, and those of fine ones
    rows = rows_of(
        triton_norm.prefix_backward, *backward, fine, coarse, children, num_prefix, 0, COARSER=coarser, SUB=2
    )
    assert set(rows) - set(parameters) == relatives
    if coarser:
        rows = rows_of(triton_norm.prefix_forward, *forward, fine, coarse, children, num_prefix, 1e-6, SUB=2)
        assert set(rows) - set(parameters) == relatives


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("src", "dst"), [("scan", "scan"), ("slice", "scan"), ("slice", "study"), ("study", "slice"), ("study", "scan")]
)
def test_add_regroup_norm_reads_and_writes_every_row_once(
    src: Level, dst: Level, update_dtype: torch.dtype, scaled: bool
) -> None:
    """Forward: residual and update of each row of src (of a clone's source for each clone), the two results of each row
    of dst, and what each program reads beside: 16 bytes of map and bounds, 4 of its parent, 4 of where clones come
    from; prefix programs 12 of map and bounds and 4 for each fine group; weight and bias. Backward alike. With scales,
    the bounds only: every address is in the tensor of those that are read with it."""
    width, num_prefix = 24, 3
    layout = StudyLayout.from_grids([[(2, 5, 7), (3, 4, 4)], [(1, 6, 6)]], num_prefix)
    rows = {level: layout.num_rows(level) for level in (src, dst)}
    same, (fine, coarse) = src == dst, sorted((src, dst), key=LEVELS.index)
    coarser = not same and src == fine
    relations = (None, None) if same else (layout.children(fine, coarse), layout.parents(fine, coarse))
    bounds = layout.cu_seqlens(src), layout.cu_seqlens(dst)
    regroup = Regroup(*bounds, layout.tiles(fine)[0], *relations, num_prefix, coarser)
    residual, weight = torch.randn(rows[src], width), torch.randn(width)
    update = torch.randn(rows[src], width).to(update_dtype)
    tiles = len(regroup.tiles)
    families = 0 if same else layout.num_groups(coarse) * num_prefix
    row, update_row = 4 * width, update_dtype.itemsize * width
    of_tiles = tiles * (16 if same else 20)
    of_families = 12 * families + 4 * layout.num_groups(fine) * num_prefix * (not same)
    if scaled:
        scales = torch.rand(layout.num_groups(src)), torch.rand(width)
        with watched():
            x, y, mean, rstd = triton_norm.forward(residual, update, *scales, weight, weight, regroup, 1e-6)
            triton_norm.backward(x, y, x, mean, rstd, update, *scales, weight, regroup)
        return
    with watched() as traffic:
        x, y, mean, rstd = triton_norm.forward(residual, update, None, None, weight, weight, regroup, 1e-6)
        read, bounds, programs = rows[src], of_tiles, tiles
        if coarser:
            bounds, programs = of_tiles + of_families, tiles + families
        elif not same:  # a prefix row for each of its clones, and where it is
            read, bounds = rows[dst], of_tiles + 4 * tiles
        assert traffic.total.loaded == read * (row + update_row) + bounds + programs * 2 * row
        assert traffic.total.stored == rows[dst] * (row + update_row + 8)
        traffic.kernels.clear()
        grads = torch.ones_like(x), torch.ones_like(y)
        triton_norm.backward(*grads, x, mean, rstd, None, None, None, weight, regroup)
    bounds = of_tiles + of_families
    assert traffic.total.loaded == rows[dst] * (2 * row + update_row + 8) + bounds + (tiles + families) * row
    separate = update_row if update_dtype != residual.dtype else 0  # one gradient serves as both where it can
    assert traffic.total.stored == rows[src] * (row + separate) + (tiles + families) * 2 * row
