"""Variable-length attention over nested groups in Triton: forward, dq, dkdv.

Shapes: R = G * P + T rows, G groups, P prefix rows a group, T patch tokens, H heads, D head dim.

Row r of group g is row g * P + r of the tensor if r < P, else G * P + cu_seqlens[g] + r - P. A program owns the
tile of rows that its entry of the tile map names, and streams all rows of the group past it. The map lists the
tiles of the longest groups first and no empty ones.

Streamed rows come in two parts. The prefix rows and the n % STREAMED first patches go first, in masked tiles;
what is left is a contiguous run of full tiles, read by moving pointers, without a mask. So prefix rows and ragged
ends cost nothing in the loop that matters, and the number of tiles is the least that covers the group.

Every program writes rows that no other writes: no atomics, and the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import BLOCK_D, AttentionConfig, Tile, architecture, attention_config, kind_of, max_registers
from .groups import Groups, check_attention

# What differs from batch to batch must not make the compiler specialise: it would compile anew for mixes of studies.
VARYING = ["num_rows", "prefix_rows"]
MAPS = ["Tiles", "CuSeqlens"]
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(Tiles, CuSeqlens, prefix_rows, P):
    """This program's group: its first row, number of patches, and where its prefix rows and row 0 of its patches
    would lie; int64."""
    entry = Tiles + 2 * tl.program_id(0).to(tl.int64)
    group = tl.load(entry).to(tl.int64)
    first = tl.load(entry + 1)
    start = tl.load(CuSeqlens + group).to(tl.int64)
    num_patches = (tl.load(CuSeqlens + group + 1) - start).to(tl.int32)
    return first, num_patches, group * P, prefix_rows + start - P


@triton.jit
def _rows(r, P, prefix_base, patch_base):
    """Rows of a group, counted in the group, to rows of the tensor: int64."""
    return tl.where(r < P, prefix_base, patch_base) + r


@triton.jit
def _load(pointers, m_rows, m_d, EVEN_ROWS: tl.constexpr, EVEN_D: tl.constexpr):
    if EVEN_ROWS:
        if EVEN_D:
            return tl.load(pointers)
        return tl.load(pointers, mask=m_d, other=0.0)
    if EVEN_D:
        return tl.load(pointers, mask=m_rows, other=0.0)
    return tl.load(pointers, mask=m_rows & m_d, other=0.0)


@triton.jit
def _attend(b_q, p_k, slot, m_k, m_d, b_m, b_l, b_acc, qk_scale,
            MASKED: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of keys and values into the running softmax. p_k: [N, D] pointers; v lies `slot` after k."""
    b_k = tl.trans(_load(p_k, m_k[:, None], m_d[None, :], not MASKED, EVEN_D))
    b_v = _load(p_k + slot, m_k[:, None], m_d[None, :], not MASKED, EVEN_D)
    b_s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [M, N]
    if MASKED:
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    # In units of log2. Scaling after the maximum leaves one fused multiply-add per score; it needs a positive scale.
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * qk_scale)
    b_p = tl.exp2(b_s * qk_scale - b_m_new[:, None])
    b_alpha = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_m_new, b_l, b_acc


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MAPS)
def attention_forward(
    QKV, Out, Lse, Tiles, CuSeqlens,
    stride_row, stride_slot, stride_head, num_rows, prefix_rows, qk_scale, P,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out [R, H, D] and lse [H, R] of the program's query rows."""
    first, num_patches, prefix_base, patch_base = _tile(Tiles, CuSeqlens, prefix_rows, P)
    head = tl.program_id(1).to(tl.int64)
    p_base = QKV + head * stride_head
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    EVEN_D: tl.constexpr = BLOCK_D == D

    r_q = first + tl.arange(0, ROWS)
    m_q = r_q < num_patches + P
    row_q = _rows(r_q, P, prefix_base, patch_base)
    p_q = p_base + row_q[:, None] * stride_row + o_d[None, :]
    b_q = _load(p_q, m_q[:, None], m_d[None, :], False, EVEN_D)

    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    o_k = tl.arange(0, STREAMED)
    mixed = P + num_patches % STREAMED
    for begin in tl.range(0, mixed, STREAMED, num_stages=1):
        r_k = begin + o_k
        row_k = _rows(r_k, P, prefix_base, patch_base)
        p_k = p_base + stride_slot + row_k[:, None] * stride_row + o_d[None, :]
        b_m, b_l, b_acc = _attend(
            b_q, p_k, stride_slot, r_k < mixed, m_d, b_m, b_l, b_acc, qk_scale, True, EVEN_D, PRECISION
        )
    p_run = p_base + stride_slot + (patch_base + mixed) * stride_row + o_k[:, None] * stride_row + o_d[None, :]
    for _ in range(num_patches // STREAMED):
        b_m, b_l, b_acc = _attend(
            b_q, p_run, stride_slot, o_k >= 0, m_d, b_m, b_l, b_acc, qk_scale, False, EVEN_D, PRECISION
        )
        p_run += STREAMED * stride_row

    p_out = Out + (row_q[:, None] * H + head) * D + o_d[None, :]
    tl.store(p_out, (b_acc / b_l[:, None]).to(Out.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])
    tl.store(Lse + head * num_rows + row_q, (b_m + tl.log2(b_l)) / LOG2_E, mask=m_q)


@triton.jit
def _add_dq(b_q, b_do, b_lse, b_delta, p_k, slot, m_k, m_d, b_dq, qk_scale,
            MASKED: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    b_k = _load(p_k, m_k[:, None], m_d[None, :], not MASKED, EVEN_D)  # [N, D]
    b_v = _load(p_k + slot, m_k[:, None], m_d[None, :], not MASKED, EVEN_D)
    b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * qk_scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_k[None, :], b_p, 0.0)  # exp2 may be infinite there, and infinity times 0 is not 0
    b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MAPS)
def attention_dq(
    QKV, Out, GradOut, Lse, Delta, GradQKV, Tiles, CuSeqlens,
    stride_row, stride_slot, stride_head, num_rows, prefix_rows, softmax_scale, qk_scale, P,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slot 0 of the packed gradient, and delta = sum(out * grad_out) [H, R], of the program's query rows."""
    first, num_patches, prefix_base, patch_base = _tile(Tiles, CuSeqlens, prefix_rows, P)
    head = tl.program_id(1).to(tl.int64)
    p_base = QKV + head * stride_head
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    EVEN_D: tl.constexpr = BLOCK_D == D

    r_q = first + tl.arange(0, ROWS)
    m_q = r_q < num_patches + P
    row_q = _rows(r_q, P, prefix_base, patch_base)
    b_q = _load(p_base + row_q[:, None] * stride_row + o_d[None, :], m_q[:, None], m_d[None, :], False, EVEN_D)
    o_out = (row_q[:, None] * H + head) * D + o_d[None, :]
    b_do = _load(GradOut + o_out, m_q[:, None], m_d[None, :], False, EVEN_D)
    b_out = _load(Out + o_out, m_q[:, None], m_d[None, :], False, EVEN_D)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(Delta + head * num_rows + row_q, b_delta, mask=m_q)
    b_lse = tl.load(Lse + head * num_rows + row_q, mask=m_q, other=float("inf")) * LOG2_E

    b_dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    o_k = tl.arange(0, STREAMED)
    mixed = P + num_patches % STREAMED
    for begin in tl.range(0, mixed, STREAMED, num_stages=1):
        r_k = begin + o_k
        row_k = _rows(r_k, P, prefix_base, patch_base)
        p_k = p_base + stride_slot + row_k[:, None] * stride_row + o_d[None, :]
        b_dq = _add_dq(
            b_q, b_do, b_lse, b_delta, p_k, stride_slot, r_k < mixed, m_d, b_dq, qk_scale, True, EVEN_D, PRECISION
        )
    p_run = p_base + stride_slot + (patch_base + mixed) * stride_row + o_k[:, None] * stride_row + o_d[None, :]
    for _ in range(num_patches // STREAMED):
        b_dq = _add_dq(
            b_q, b_do, b_lse, b_delta, p_run, stride_slot, o_k >= 0, m_d, b_dq, qk_scale, False, EVEN_D, PRECISION
        )  # fmt: skip
        p_run += STREAMED * stride_row
    p_dq = GradQKV + (row_q[:, None] * 3 * H + head) * D + o_d[None, :]
    tl.store(p_dq, (b_dq * softmax_scale).to(GradQKV.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])


@triton.jit
def _add_dkdv(b_k, b_v, p_q, p_do, p_lse, p_delta, m_q, m_d, b_dk, b_dv, qk_scale,
              MASKED: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries into dk and dv. A row out of range has lse = inf, so p = 0: scores need no mask."""
    b_q = _load(p_q, m_q[:, None], m_d[None, :], not MASKED, EVEN_D)  # [M, D]
    b_do = _load(p_do, m_q[:, None], m_d[None, :], not MASKED, EVEN_D)
    if MASKED:
        b_lse = tl.load(p_lse, mask=m_q, other=float("inf")) * LOG2_E
        b_delta = tl.load(p_delta, mask=m_q, other=0.0)
    else:
        b_lse = tl.load(p_lse) * LOG2_E
        b_delta = tl.load(p_delta)
    b_pT = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * qk_scale - b_lse[None, :])  # [N, M]
    b_dv = tl.dot(b_pT.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dsT = b_pT * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    b_dk = tl.dot(b_dsT.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MAPS)
def attention_dkdv(
    QKV, GradOut, Lse, Delta, GradQKV, Tiles, CuSeqlens,
    stride_row, stride_slot, stride_head, num_rows, prefix_rows, softmax_scale, qk_scale, P,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STREAMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slots 1 and 2 of the packed gradient of the program's key rows."""
    first, num_patches, prefix_base, patch_base = _tile(Tiles, CuSeqlens, prefix_rows, P)
    head = tl.program_id(1).to(tl.int64)
    p_base = QKV + head * stride_head
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    EVEN_D: tl.constexpr = BLOCK_D == D

    r_k = first + tl.arange(0, ROWS)
    m_k = r_k < num_patches + P
    row_k = _rows(r_k, P, prefix_base, patch_base)
    p_k = p_base + stride_slot + row_k[:, None] * stride_row + o_d[None, :]
    b_k = _load(p_k, m_k[:, None], m_d[None, :], False, EVEN_D)
    b_v = _load(p_k + stride_slot, m_k[:, None], m_d[None, :], False, EVEN_D)

    b_dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    o_q = tl.arange(0, STREAMED)
    p_do_base = GradOut + head * D
    mixed = P + num_patches % STREAMED
    for begin in tl.range(0, mixed, STREAMED, num_stages=1):
        r_q = begin + o_q
        row_q = _rows(r_q, P, prefix_base, patch_base)
        o_mixed = head * num_rows + row_q
        b_dk, b_dv = _add_dkdv(
            b_k, b_v, p_base + row_q[:, None] * stride_row + o_d[None, :],
            p_do_base + row_q[:, None] * (H * D) + o_d[None, :],
            Lse + o_mixed, Delta + o_mixed, r_q < mixed, m_d, b_dk, b_dv, qk_scale, True, EVEN_D, PRECISION,
        )  # fmt: skip
    run = patch_base + mixed
    p_q = p_base + run * stride_row
    p_do = p_do_base + run * (H * D)
    o_stat = head * num_rows + run
    o_run_q = o_q[:, None] * stride_row + o_d[None, :]
    o_run_do = o_q[:, None] * (H * D) + o_d[None, :]
    for _ in range(num_patches // STREAMED):
        b_dk, b_dv = _add_dkdv(
            b_k, b_v, p_q + o_run_q, p_do + o_run_do, Lse + o_stat + o_q, Delta + o_stat + o_q,
            o_q >= 0, m_d, b_dk, b_dv, qk_scale, False, EVEN_D, PRECISION,
        )  # fmt: skip
        p_q += STREAMED * stride_row
        p_do += STREAMED * H * D
        o_stat += STREAMED
    p_dk = GradQKV + ((row_k[:, None] * 3 + 1) * H + head) * D + o_d[None, :]
    m_store = m_k[:, None] & m_d[None, :]
    tl.store(p_dk, (b_dk * softmax_scale).to(GradQKV.dtype.element_ty), mask=m_store)
    tl.store(p_dk + H * D, b_dv.to(GradQKV.dtype.element_ty), mask=m_store)


def forward(qkv: Tensor, groups: Groups, softmax_scale: float) -> tuple[Tensor, Tensor]:
    check_attention(qkv, groups, softmax_scale)
    qkv = _last_contiguous(qkv)
    num_rows, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(num_rows, heads, head_dim)
    lse = qkv.new_empty(heads, num_rows, dtype=torch.float32)
    launch_forward(qkv, out, lse, groups, softmax_scale, _config(qkv, groups).forward)
    return out, lse


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float) -> Tensor:
    check_attention(qkv, groups, softmax_scale, out, lse, grad_out)
    qkv, grad_out, out, lse = _last_contiguous(qkv), grad_out.contiguous(), out.contiguous(), lse.contiguous()
    delta, grad_qkv = torch.empty_like(lse), qkv.new_empty(qkv.shape)
    config = _config(qkv, groups)
    launch_dq(qkv, out, grad_out, lse, delta, grad_qkv, groups, softmax_scale, config.dq)
    launch_dkdv(qkv, grad_out, lse, delta, grad_qkv, groups, softmax_scale, config.dkdv)
    return grad_qkv


def launch_forward(qkv: Tensor, out: Tensor, lse: Tensor, groups: Groups, softmax_scale: float, tile: Tile) -> None:
    """Writes out and lse."""
    tiles = groups.tile_map(tile.rows)
    if len(tiles):
        attention_forward[(len(tiles), qkv.shape[2])](
            qkv, out, lse, tiles, *_geometry(qkv, groups), softmax_scale * LOG2_E.value, groups.num_prefix,
            **_constants(qkv, tile),
        )  # fmt: skip


def launch_dq(
    qkv: Tensor,
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_qkv: Tensor,
    groups: Groups,
    softmax_scale: float,
    tile: Tile,
) -> None:
    """Writes delta and slot 0 of grad_qkv."""
    tiles = groups.tile_map(tile.rows)
    if len(tiles):
        attention_dq[(len(tiles), qkv.shape[2])](
            qkv, out, grad_out, lse, delta, grad_qkv, tiles, *_geometry(qkv, groups),
            softmax_scale, softmax_scale * LOG2_E.value, groups.num_prefix, **_constants(qkv, tile),
        )  # fmt: skip


def launch_dkdv(
    qkv: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_qkv: Tensor,
    groups: Groups,
    softmax_scale: float,
    tile: Tile,
) -> None:
    """Writes slots 1 and 2 of grad_qkv."""
    tiles = groups.tile_map(tile.rows)
    if len(tiles):
        attention_dkdv[(len(tiles), qkv.shape[2])](
            qkv, grad_out, lse, delta, grad_qkv, tiles, *_geometry(qkv, groups),
            softmax_scale, softmax_scale * LOG2_E.value, groups.num_prefix, **_constants(qkv, tile),
        )  # fmt: skip


def _geometry(qkv: Tensor, groups: Groups) -> tuple[Any, ...]:
    prefix_rows = (len(groups.cu_seqlens) - 1) * groups.num_prefix
    return groups.cu_seqlens, *qkv.stride()[:3], qkv.shape[0], prefix_rows


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _config(qkv: Tensor, groups: Groups) -> AttentionConfig:
    arch = architecture(qkv.device.index or 0)
    return attention_config(arch, qkv.dtype, qkv.shape[3], groups.max_seqlen, _tf32(qkv))


def _tf32(qkv: Tensor) -> bool:
    """Whether the caller lets PyTorch's own products of float32 run in tf32."""
    if qkv.dtype != torch.float32:
        return False
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:  # before PyTorch 2.9
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return (getattr(torch.backends, "fp32_precision", "ieee") if precision == "none" else precision) == "tf32"


def _constants(qkv: Tensor, tile: Tile) -> dict[str, Any]:
    kind = kind_of(qkv.dtype, _tf32(qkv))
    registers = None if torch.version.hip else max_registers(kind, tile.warps)
    return {
        "H": qkv.shape[2],
        "D": qkv.shape[3],
        "BLOCK_D": BLOCK_D[qkv.shape[3]],
        "ROWS": tile.rows,
        "STREAMED": tile.streamed,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({} if registers is None else {"maxnreg": registers}),
    }
