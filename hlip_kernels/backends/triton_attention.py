"""Variable-length attention in Triton: forward, dq, dkdv.

Shapes: R rows of queries, S rows of keys and values, G groups, H heads, D head dim.

The queries of group g are a run of rows, and so are its keys; where either begins and how many rows it has is told
apart (`Spans`). A program owns the tile of queries (in dkdv, of keys) that its entry of the tile map names, and streams
the group's keys (queries) past it. The map lists the tiles of the longest groups first and no empty ones.

Streamed rows come in whole tiles, read at moving offsets without a mask in a pipelined loop, and what is left in
masked tiles of `TAIL` rows, so that a ragged end costs next to nothing. The tail comes last and is not pipelined: in
front, or pipelined, it would make the compiler for sm_90 wait for every matrix instruction of the loop that matters.
In float32, whose products fill the registers, what is left is one more tile of the same shape.

Every program writes rows that no other writes: no atomics, and the same bits on every run.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import BLOCK_D, AttentionConfig, Tile, allows_tf32, architecture, attention_config, kind_of, max_registers
from .base import QKV, Spans, check_attention

# What differs from batch to batch must not make the compiler specialise: it would compile anew for mixes of studies.
VARYING = ["num_rows"]
MAPS = ["Tiles", "CuQueries", "CuKeys", "UsedQueries", "UsedKeys"]
LOG2_E = tl.constexpr(1.4426950408889634)
MAX_HEADS = 65535  # of a CUDA grid's second dimension
TAIL = tl.constexpr(16)  # the least that matrix units take


@triton.jit
def _span(CuSeqlens, SeqUsed, group):
    """The first row of a group, int64, and how many it has."""
    begin = tl.load(CuSeqlens + group)
    length = tl.load(CuSeqlens + group + 1) - begin if SeqUsed is None else tl.load(SeqUsed + group)
    return begin.to(tl.int64), length


@triton.jit
def _tile(Tiles, CuQueries, CuKeys, UsedQueries, UsedKeys):
    """This program's head, the first row of its tile in the group, and the group's queries and keys."""
    entry = Tiles + 2 * tl.program_id(0).to(tl.int64)
    group = tl.load(entry)
    q_begin, num_q = _span(CuQueries, UsedQueries, group)
    k_begin, num_k = _span(CuKeys, UsedKeys, group)
    return tl.program_id(1).to(tl.int64), tl.load(entry + 1), q_begin, num_q, k_begin, num_k


@triton.jit
def _rows(o_rows, stride, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D] offsets of rows `o_rows`, int64."""
    return o_rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(pointers, m_rows, D: tl.constexpr):
    """[N, BLOCK_D] values; all rows if there is no mask of rows."""
    EVEN_D: tl.constexpr = pointers.shape[1] == D
    m_d = tl.arange(0, pointers.shape[1])[None, :] < D
    if m_rows is None:
        values = tl.load(pointers) if EVEN_D else tl.load(pointers, mask=m_d, other=0.0)
    else:
        values = tl.load(pointers, mask=m_rows[:, None] if EVEN_D else m_rows[:, None] & m_d, other=0.0)
    return values


@triton.jit
def _store(pointers, values, m_rows, D: tl.constexpr):
    m_d = tl.arange(0, pointers.shape[1])[None, :] < D
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=m_rows[:, None] & m_d)


@triton.jit
def _attend(b_q, p_k, p_v, m_k, b_m, b_l, b_acc, qk_scale,
            D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys and values into the running softmax."""
    b_k = tl.trans(_load(p_k, m_k, D))
    b_v = _load(p_v, m_k, D)
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [M, N]
    if m_k is not None:
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    # In units of log2. Scaling after the maximum leaves one fused multiply-add per score; it needs a positive scale.
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * qk_scale)
    b_ref = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # a row of scores that are all -inf: no inf - inf
    b_p = tl.exp2(b_s * qk_scale - b_ref[:, None])
    b_alpha = tl.exp2(b_m - b_ref)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_m_new, b_l, b_acc


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MAPS)
def attention_forward(
    Q, K, V, Out, Lse, Tiles, CuQueries, CuKeys, UsedQueries, UsedKeys,
    stride_q, stride_q_head, stride_k, stride_k_head, num_rows, qk_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out [R, H, D] and lse [H, R] of the program's queries."""
    head, first, q_begin, num_q, k_begin, num_k = _tile(Tiles, CuQueries, CuKeys, UsedQueries, UsedKeys)
    o_q = tl.arange(0, ROWS)
    m_q = first + o_q < num_q
    row = q_begin + first
    b_q = _load(Q + row * stride_q + head * stride_q_head + _rows(o_q, stride_q, BLOCK_D), m_q, D)

    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    base = k_begin * stride_k + head * stride_k_head
    o_run = _rows(tl.arange(0, STREAMED), stride_k, BLOCK_D) + base
    for _ in range(num_k // STREAMED):
        b_m, b_l, b_acc = _attend(b_q, K + o_run, V + o_run, None, b_m, b_l, b_acc, qk_scale, D, PRECISION)
        o_run += STREAMED * stride_k
    REST: tl.constexpr = STREAMED if K.dtype.element_ty.is_fp32() else TAIL
    for begin in tl.range(num_k - num_k % STREAMED, num_k, REST, num_stages=1):
        r_k = begin + tl.arange(0, REST)
        o_k = _rows(r_k, stride_k, BLOCK_D) + base
        b_m, b_l, b_acc = _attend(b_q, K + o_k, V + o_k, r_k < num_k, b_m, b_l, b_acc, qk_scale, D, PRECISION)

    b_l = tl.where(b_l == 0.0, 1.0, b_l)  # no keys: 0, and a lse of -inf
    _store(Out + (row * H + head) * D + _rows(o_q, H * D, BLOCK_D), b_acc / b_l[:, None], m_q, D)
    tl.store(Lse + head * num_rows + row + o_q, (b_m + tl.log2(b_l)) / LOG2_E, mask=m_q)


@triton.jit
def _add_dq(b_q, b_do, b_lse, b_delta, p_k, p_v, m_k, b_dq, qk_scale,
            D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    b_k = _load(p_k, m_k, D)  # [N, D]
    b_v = _load(p_v, m_k, D)
    if PRECISION == "ieee" and b_k.dtype.is_fp32():
        tl.debug_barrier()  # else the compiler puts one after it has read all of b_q, whose rows fill the registers
    b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * qk_scale - b_lse[:, None])
    if m_k is not None:
        b_p = tl.where(m_k[None, :], b_p, 0.0)  # exp2 may be infinite there, and infinity times 0 is not 0
    b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MAPS)
def attention_dq(
    Q, K, V, Out, GradOut, Lse, Stats, GradQ, Tiles, CuQueries, CuKeys, UsedQueries, UsedKeys,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_do, stride_do_head, stride_dq, stride_dq_head,
    num_rows, softmax_scale, qk_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the program's queries, and their statistics for `attention_dkdv`, Stats [H, R, 2]: lse in units
    of log2, and delta = sum(out * grad_out)."""
    head, first, q_begin, num_q, k_begin, num_k = _tile(Tiles, CuQueries, CuKeys, UsedQueries, UsedKeys)
    o_q = tl.arange(0, ROWS)
    m_q = first + o_q < num_q
    row = q_begin + first
    b_q = _load(Q + row * stride_q + head * stride_q_head + _rows(o_q, stride_q, BLOCK_D), m_q, D)
    b_do = _load(GradOut + row * stride_do + head * stride_do_head + _rows(o_q, stride_do, BLOCK_D), m_q, D)
    b_out = _load(Out + (row * H + head) * D + _rows(o_q, H * D, BLOCK_D), m_q, D)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    o_stats = head * num_rows + row + o_q
    b_lse = tl.load(Lse + o_stats, mask=m_q, other=float("inf")) * LOG2_E
    tl.store(Stats + _rows(o_stats, 2, 2), tl.join(b_lse, b_delta), mask=m_q[:, None])

    b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    base = k_begin * stride_k + head * stride_k_head
    o_run = _rows(tl.arange(0, STREAMED), stride_k, BLOCK_D) + base
    for _ in range(num_k // STREAMED):
        b_dq = _add_dq(b_q, b_do, b_lse, b_delta, K + o_run, V + o_run, None, b_dq, qk_scale, D, PRECISION)
        o_run += STREAMED * stride_k
    REST: tl.constexpr = STREAMED if K.dtype.element_ty.is_fp32() else TAIL
    for begin in tl.range(num_k - num_k % STREAMED, num_k, REST, num_stages=1):
        r_k = begin + tl.arange(0, REST)
        o_k = _rows(r_k, stride_k, BLOCK_D) + base
        b_dq = _add_dq(b_q, b_do, b_lse, b_delta, K + o_k, V + o_k, r_k < num_k, b_dq, qk_scale, D, PRECISION)
    p_dq = GradQ + row * stride_dq + head * stride_dq_head + _rows(o_q, stride_dq, BLOCK_D)
    _store(p_dq, b_dq * softmax_scale, m_q, D)


@triton.jit
def _add_dkdv(b_k, b_v, p_q, p_do, p_stats, m_q, b_dk, b_dv, qk_scale,
              D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries into dk and dv. A row out of range has lse = inf, so p = 0: scores need no mask."""
    b_q = _load(p_q, m_q, D)  # [M, D]
    b_do = _load(p_do, m_q, D)
    if m_q is None:
        b_lse, b_delta = tl.split(tl.load(p_stats))
    else:
        b_lse, b_delta = tl.split(tl.load(p_stats, mask=m_q[:, None], other=float("inf")))
        b_delta = tl.where(m_q, b_delta, 0.0)
    b_pT = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * qk_scale - b_lse[None, :])  # [N, M]
    b_dv = tl.dot(b_pT.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dsT = b_pT * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    b_dk = tl.dot(b_dsT.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MAPS)
def attention_dkdv(
    Q, K, V, GradOut, Stats, GradK, GradV, Tiles, CuQueries, CuKeys, UsedQueries, UsedKeys,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_do, stride_do_head, stride_dk, stride_dk_head,
    stride_dv, stride_dv_head, num_rows, softmax_scale, qk_scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the program's keys and values."""
    head, first, q_begin, num_q, k_begin, num_k = _tile(Tiles, CuQueries, CuKeys, UsedQueries, UsedKeys)
    o_k = tl.arange(0, ROWS)
    m_k = first + o_k < num_k
    row = k_begin + first
    o_own = row * stride_k + head * stride_k_head + _rows(o_k, stride_k, BLOCK_D)
    b_k = _load(K + o_own, m_k, D)
    b_v = _load(V + o_own, m_k, D)

    b_dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    q_base = q_begin * stride_q + head * stride_q_head
    do_base = q_begin * stride_do + head * stride_do_head
    stats_base = 2 * (head * num_rows + q_begin)
    o_q = tl.arange(0, STREAMED)
    o_run = _rows(o_q, stride_q, BLOCK_D) + q_base
    o_run_do = _rows(o_q, stride_do, BLOCK_D) + do_base
    p_stats = Stats + stats_base + _rows(o_q, 2, 2)
    for _ in range(num_q // STREAMED):
        b_dk, b_dv = _add_dkdv(
            b_k, b_v, Q + o_run, GradOut + o_run_do, p_stats, None, b_dk, b_dv, qk_scale, D, PRECISION
        )
        o_run += STREAMED * stride_q
        o_run_do += STREAMED * stride_do
        p_stats += 2 * STREAMED
    REST: tl.constexpr = STREAMED if Q.dtype.element_ty.is_fp32() else TAIL
    for begin in tl.range(num_q - num_q % STREAMED, num_q, REST, num_stages=1):
        r_q = begin + tl.arange(0, REST)
        b_dk, b_dv = _add_dkdv(
            b_k, b_v, Q + q_base + _rows(r_q, stride_q, BLOCK_D), GradOut + do_base + _rows(r_q, stride_do, BLOCK_D),
            Stats + stats_base + _rows(r_q, 2, 2), r_q < num_q, b_dk, b_dv, qk_scale, D, PRECISION,
        )  # fmt: skip

    p_dk = GradK + row * stride_dk + head * stride_dk_head + _rows(o_k, stride_dk, BLOCK_D)
    p_dv = GradV + row * stride_dv + head * stride_dv_head + _rows(o_k, stride_dv, BLOCK_D)
    _store(p_dk, b_dk * softmax_scale, m_k, D)
    _store(p_dv, b_dv, m_k, D)


def forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, queries, keys, softmax_scale)
    q, k, v = _readable(q, k, v)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    launch_forward(q, k, v, out, lse, queries, keys, softmax_scale, _config(q).forward)
    return out, lse


def backward(
    grads: QKV,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Spans,
    keys: Spans,
    softmax_scale: float,
) -> None:
    check_attention(q, k, v, queries, keys, softmax_scale, out, lse, grad_out, grads)
    for name, grad in zip(("grad_q", "grad_k", "grad_v"), grads, strict=True):
        if grad.stride(2) != 1:
            raise ValueError(f"{name}: expected memory whose last dimension is contiguous, got strides {grad.stride()}")
    q, k, v = _readable(q, k, v)
    grad_out = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    stats = lse.new_empty(*lse.shape, 2)
    grad_q, grad_k, grad_v = grads
    config = _config(q)
    launch_dq(q, k, v, out, grad_out, lse, stats, grad_q, queries, keys, softmax_scale, config.dq)
    launch_dkdv(q, k, v, grad_out, stats, grad_k, grad_v, queries, keys, softmax_scale, config.dkdv)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Spans,
    keys: Spans,
    softmax_scale: float,
    tile: Tile,
) -> None:
    """Write out and lse."""
    tiles = queries.tile_map(tile.rows)
    num_tiles = tiles.shape[0]
    if num_tiles:
        attention_forward[(num_tiles, q.shape[1])](
            q, k, v, out, lse, tiles, *_spans(queries, keys), *_strides(q, k), q.shape[0],
            softmax_scale * LOG2_E.value, **_constants(_kind(q.dtype), *q.shape[1:], tile),
        )  # fmt: skip


def launch_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    stats: Tensor,
    grad_q: Tensor,
    queries: Spans,
    keys: Spans,
    softmax_scale: float,
    tile: Tile,
) -> None:
    """Write grad_q, and stats (H, R, 2) for `launch_dkdv`."""
    tiles = queries.tile_map(tile.rows)
    num_tiles = tiles.shape[0]
    if num_tiles:
        attention_dq[(num_tiles, q.shape[1])](
            q, k, v, out, grad_out, lse, stats, grad_q, tiles, *_spans(queries, keys),
            *_strides(q, k, grad_out, grad_q), q.shape[0], softmax_scale, softmax_scale * LOG2_E.value,
            **_constants(_kind(q.dtype), *q.shape[1:], tile),
        )  # fmt: skip


def launch_dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    stats: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    queries: Spans,
    keys: Spans,
    softmax_scale: float,
    tile: Tile,
) -> None:
    """Write grad_k and grad_v."""
    tiles = keys.tile_map(tile.rows)
    num_tiles = tiles.shape[0]
    if num_tiles:
        attention_dkdv[(num_tiles, q.shape[1])](
            q, k, v, grad_out, stats, grad_k, grad_v, tiles, *_spans(queries, keys),
            *_strides(q, k, grad_out, grad_k, grad_v), q.shape[0], softmax_scale, softmax_scale * LOG2_E.value,
            **_constants(_kind(q.dtype), *q.shape[1:], tile),
        )  # fmt: skip


def _spans(queries: Spans, keys: Spans) -> tuple[Tensor | None, ...]:
    return queries.cu_seqlens, keys.cu_seqlens, queries.seqused, keys.seqused


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Those of rows and of heads."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _readable(q: Tensor, k: Tensor, v: Tensor) -> QKV:
    """As the kernels take them: values next to one another, and one set of strides for k and v."""
    if q.stride(2) != 1:
        q = q.contiguous()
    if k.stride(2) != 1 or k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


def _config(q: Tensor) -> AttentionConfig:
    return attention_config(architecture(q.device.index or 0), q.dtype, q.shape[2], allows_tf32(q.dtype))


def _kind(dtype: torch.dtype) -> str:
    return kind_of(dtype, allows_tf32(dtype))


@functools.cache
def _constants(kind: str, heads: int, head_dim: int, tile: Tile) -> dict[str, Any]:
    """The constants of a launch; not to be changed, as they are made once."""
    if heads > MAX_HEADS:
        raise ValueError(f"q: a launch holds at most {MAX_HEADS} heads, got {heads}")
    registers = None if torch.version.hip else max_registers(kind, tile.warps)
    return {
        "H": heads,
        "D": head_dim,
        "BLOCK_D": BLOCK_D[head_dim],
        "ROWS": tile.rows,
        "STREAMED": tile.streamed,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,  # Triton 3.10 no longer does so by itself
        **({} if registers is None else {"maxnreg": registers}),
    }
