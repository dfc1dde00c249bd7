"""What the Triton kernels ask of memory, seen through the interpreter: every address, and the bytes in all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import plain_groups
from hlip_kernels import Level, StudyLayout
from hlip_kernels.backends.groups import Groups, Regroup
from hlip_kernels.configs import attention_config

triton = pytest.importorskip("triton")
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from hlip_kernels.backends import triton_attention, triton_norm  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from traffic import watched  # noqa: E402

HEADS = 2
KERNELS = ("attention_forward", "attention_dq", "attention_dkdv")


def inputs(lengths: list[int], num_prefix: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, Groups]:
    rows = len(lengths) * num_prefix + sum(lengths)
    qkv = torch.randn(rows, 3, HEADS, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    return qkv, plain_groups(lengths, num_prefix)


def closed_form(groups: Groups, head_dim: int, itemsize: int) -> dict[str, tuple[int, int]]:
    """Bytes (loaded, stored) of each kernel, by the number of tiles nt that cover the L rows of each group.

    A tile's program reads its map entry and two bounds (16 bytes), and streams two rows of D values for each of
    the group's L rows; dkdv streams two statistics of 4 bytes with them.
    """
    row = head_dim * itemsize
    dtype = {2: torch.float16, 4: torch.float32}[itemsize]
    config = attention_config("sm_80", dtype, head_dim, groups.max_seqlen)
    total = {name: [0, 0] for name in KERNELS}
    for n in groups.cu_seqlens.diff().tolist():
        length = n + groups.num_prefix
        q_tiles, k_tiles = (-(-length // tile.rows) for tile in (config.forward, config.dkdv))
        for name, loaded, stored in (
            ("attention_forward", length * row + q_tiles * (2 * length * row + 16), length * (row + 4)),
            ("attention_dq", length * (3 * row + 4) + q_tiles * (2 * length * row + 16), length * (row + 4)),
            ("attention_dkdv", length * 2 * row + k_tiles * (length * (2 * row + 8) + 16), length * 2 * row),
        ):
            total[name][0] += HEADS * loaded
            total[name][1] += HEADS * stored
    return {name: (loaded, stored) for name, (loaded, stored) in total.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("lengths", "num_prefix", "head_dim"),
    [([0, 1, 63, 64, 65, 150], 1, 32), ([0, 30, 130], 0, 16), ([70, 5], 17, 80)],
)
def test_every_address_is_inside_and_bytes_are_the_closed_form(
    lengths: list[int], num_prefix: int, head_dim: int, dtype: torch.dtype
) -> None:
    qkv, groups = inputs(lengths, num_prefix, head_dim, dtype)
    expected = closed_form(groups, head_dim, dtype.itemsize)
    with watched() as traffic:
        out, lse = triton_attention.forward(qkv, groups, 0.25)
        assert (traffic.total.loaded, traffic.total.stored) == expected["attention_forward"]
        traffic.clear()
        triton_attention.backward(torch.ones_like(out), qkv, out, lse, groups, 0.25)
    backward = [expected["attention_dq"], expected["attention_dkdv"]]
    assert (traffic.total.loaded, traffic.total.stored) == tuple(map(sum, zip(*backward, strict=True)))


@pytest.mark.parametrize("level", ["slice", "scan", "study"])
def test_bytes_of_each_level(level: Level) -> None:
    layout = StudyLayout.from_grids([[(2, 5, 7), (3, 4, 4)], [(1, 6, 6)]])
    qkv = torch.randn(layout.num_groups(level) + layout.num_tokens, 3, HEADS, 16)
    groups = Groups(layout.cu_seqlens(level), layout.tiles(level), 1, layout.max_seqlen(level))
    expected = closed_form(groups, 16, 4)
    with watched() as traffic:
        out, lse = triton_attention.forward(qkv, groups, 0.25)
        assert (traffic.total.loaded, traffic.total.stored) == expected["attention_forward"]
        traffic.clear()
        triton_attention.backward(torch.ones_like(out), qkv, out, lse, groups, 0.25)
    backward = [expected["attention_dq"], expected["attention_dkdv"]]
    assert (traffic.total.loaded, traffic.total.stored) == tuple(map(sum, zip(*backward, strict=True)))


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
    """A group that begins two thousand million rows into the stream: the addresses, without the memory."""
    start, length, num_prefix, head_dim = 2_000_000_000, 150, 3, 32
    qkv = torch.zeros(4, 3, HEADS, head_dim)
    bounds = torch.tensor([start, start + length], dtype=torch.int32)
    statistics = torch.zeros(HEADS, 4)
    tile = torch.tensor([[0, 64]], dtype=torch.int32)
    seen = addresses_only(monkeypatch, [bounds, tile])
    out, grad = torch.zeros(4, HEADS, head_dim), torch.zeros_like(qkv)
    rows = 4 * np.arange(3 * HEADS * head_dim)  # bytes within one row of qkv
    shared = (bounds, *qkv.stride()[:3], start + length + num_prefix, num_prefix)
    constants = {"H": HEADS, "D": head_dim, "BLOCK_D": 32, "ROWS": 64, "STREAMED": 32, "PRECISION": "ieee"}

    def run(kernel: Any, *args: Any) -> np.ndarray:
        seen.clear()
        kernel[(1, HEADS)](*args, num_prefix, **constants)
        return np.unique(np.concatenate(seen))

    row_bytes, out_bytes = qkv.stride(0) * 4, HEADS * head_dim * 4
    patches = num_prefix + start + np.arange(length, dtype=np.int64)
    group = np.concatenate([np.arange(num_prefix), patches])
    tensors = {  # bytes of a row, and which rows the group has in it
        "qkv": qkv.data_ptr() + group[:, None] * row_bytes + rows,
        "out": out.data_ptr() + group[:, None] * out_bytes + 4 * np.arange(HEADS * head_dim),
        "grad": grad.data_ptr() + group[:, None] * row_bytes + rows,
    }
    heads = np.arange(HEADS)[:, None] * (start + length + num_prefix)
    lse = statistics.data_ptr() + 4 * (heads + group)
    delta = torch.zeros(1)
    tensors |= {"lse": lse, "delta": delta.data_ptr() + 4 * (heads + group)}
    legal = np.unique(np.concatenate([x.ravel() for x in tensors.values()])).astype(np.uint64)
    forward = run(triton_attention.attention_forward, qkv, out, statistics, tile, *shared, 0.25)
    dq = run(triton_attention.attention_dq, qkv, out, out, statistics, delta, grad, tile, *shared, 0.25, 0.25)
    dkdv = run(triton_attention.attention_dkdv, qkv, out, statistics, delta, grad, tile, *shared, 0.25, 0.25)
    for addresses in (forward, dq, dkdv):
        assert np.isin(addresses, legal).all()
    keys = tensors["qkv"].reshape(-1, 3, HEADS * head_dim)[:, 1:].ravel().astype(np.uint64)
    assert np.isin(keys, forward).all()
    assert int(forward.max() - np.uint64(qkv.data_ptr())) > 2**31


def test_offsets_of_the_norm_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    start, length, num_prefix, width = 2_000_000_000, 40, 3, 16
    bounds = torch.tensor([start, start + length], dtype=torch.int32)
    tile = torch.tensor([[0, 0]], dtype=torch.int32)
    families = torch.tensor([1_000_000_000, 1_000_000_005], dtype=torch.int32)  # a coarse group's run of fine ones
    seen = addresses_only(monkeypatch, [bounds, tile, families])
    x, statistics = torch.zeros(4, width), torch.zeros(4)
    base = x.data_ptr()
    forward = x, x, None, None, x, x, x, x, statistics, statistics
    backward = x, x, x, statistics, statistics, None, None, None, x, x, x, x
    for src_rows, dst_rows in ((num_prefix, num_prefix), (5 * num_prefix, num_prefix)):
        constants = {"SAME": src_rows == dst_rows, "C": width, "BLOCK_C": 16, "ROWS": 64, "SUB": 2}
        patches = start + np.arange(length, dtype=np.int64)
        rows = [np.arange(num_prefix), src_rows + patches, dst_rows + patches]  # the prefix, or weight and bias
        legal = [base + (np.concatenate(rows)[:, None] * width + np.arange(width)) * 4]
        legal += [statistics.data_ptr() + np.concatenate(rows) * 4]
        legal = np.unique(np.concatenate([a.ravel() for a in legal])).astype(np.uint64)
        for kernel, tensors, rest in (
            (triton_norm.norm_forward, forward, (1e-6,)),
            (triton_norm.norm_backward, backward, ()),
        ):
            seen.clear()
            kernel[(1,)](*tensors, tile, bounds, src_rows, dst_rows, num_prefix, *rest, **constants)
            addresses = np.concatenate(seen)
            assert np.isin(addresses, legal).all()
            assert int(addresses.max()) - base >= 4 * width * start
    for coarser in (True, False):
        constants = {"COARSER": coarser, "C": width, "BLOCK_C": 16, "SUB": 2}
        children = (1_000_000_000 + np.arange(5)) * num_prefix
        rows = np.concatenate([np.arange(3), children])
        for kernel, tensors, rest in (
            (triton_norm.prefix_forward, forward, (1e-6,)),
            (triton_norm.prefix_backward, backward, (0,)),
        ):
            seen.clear()
            kernel[(1,)](*tensors, families, num_prefix, *rest, **constants)
            addresses = np.concatenate(seen)
            legal = np.concatenate([(base + (rows[:, None] * width + np.arange(width)) * 4).ravel(),
                                    statistics.data_ptr() + rows * 4])  # fmt: skip
            assert np.isin(addresses, legal.astype(np.uint64)).all()
            assert int(addresses.max()) - base >= 4 * width * int(children[-1])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("src", "dst"), [("scan", "scan"), ("slice", "scan"), ("slice", "study"), ("study", "slice"), ("study", "scan")]
)
def test_add_regroup_norm_reads_and_writes_every_row_once(
    src: Level, dst: Level, update_dtype: torch.dtype, scaled: bool
) -> None:
    """Forward: residual and update of each row of src, the two results of each row of dst, and what each program
    reads beside: 16 bytes of bounds (prefix programs 8), weight and bias. Backward alike. With scales, the bounds only:
    every address is in the tensor of those that are read with it."""
    width, num_prefix = 24, 3
    layout = StudyLayout.from_grids([[(2, 5, 7), (3, 4, 4)], [(1, 6, 6)]], num_prefix)
    rows = {level: layout.num_groups(level) * num_prefix + layout.num_tokens for level in (src, dst)}
    children = None if src == dst else layout.children(*sorted((src, dst), key=("slice", "scan", "study").index))
    regroup = Regroup(layout.cu_seqlens(src), layout.tiles(src)[0], children, num_prefix, layout.num_groups(dst))
    residual, weight = torch.randn(rows[src], width), torch.randn(width)
    update = torch.randn(rows[src], width).to(update_dtype)
    tiles = len(regroup.tiles)
    families = 0 if children is None else (len(children) - 1) * num_prefix
    row, update_row = 4 * width, update_dtype.itemsize * width
    bounds = 16 * tiles + 8 * families
    if scaled:
        scales = torch.rand(layout.num_groups(src)), torch.rand(width)
        with watched():
            x, y, mean, rstd = triton_norm.forward(residual, update, *scales, weight, weight, regroup, 1e-6)
            triton_norm.backward(x, y, x, mean, rstd, update, *scales, weight, regroup)
        return
    with watched() as traffic:
        x, y, mean, rstd = triton_norm.forward(residual, update, None, None, weight, weight, regroup, 1e-6)
        assert traffic.total.loaded == rows[src] * (row + update_row) + bounds + (tiles + families) * 2 * row
        assert traffic.total.stored == rows[dst] * (row + update_row + 8)
        traffic.clear()
        grads = torch.ones_like(x), torch.ones_like(y)
        triton_norm.backward(*grads, x, mean, rstd, None, None, None, weight, regroup)
    assert traffic.total.loaded == rows[dst] * (2 * row + update_row + 8) + bounds + (tiles + families) * row
    separate = update_row if update_dtype != residual.dtype else 0  # one gradient serves as both where it can
    assert traffic.total.stored == rows[src] * (row + separate) + (tiles + families) * 2 * row
