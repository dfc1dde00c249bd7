"""Plain dense attention in Triton: one group length for all, whole tiles, no prefix rows, no masks.

What the nested-group kernels are measured against: their loop over full tiles should cost no more than this.
qkv is (B, N, 3, H, D) with N a multiple of every tile; grid (N / ROWS, B * H). K and V share one pointer.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_forward(
    QKV, Out, Lse, stride_row, stride_slot, stride_head, N, qk_scale,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    base = QKV + batch.to(tl.int64) * N * stride_row + head * stride_head
    o_d = tl.arange(0, D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    q = tl.load(base + rows[:, None] * stride_row + o_d[None, :])
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    p_k = base + stride_slot + tl.arange(0, STREAMED)[:, None] * stride_row + o_d[None, :]
    for _ in range(N // STREAMED):
        k = tl.load(p_k)
        v = tl.load(p_k + stride_slot)
        s = tl.dot(q, tl.trans(k))
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
        p_k += STREAMED * stride_row
    o_out = ((batch.to(tl.int64) * N + rows[:, None]) * H + head) * D + o_d[None, :]
    tl.store(Out + o_out, (acc / total[:, None]).to(Out.dtype.element_ty))
    tl.store(Lse + tl.program_id(1).to(tl.int64) * N + rows, (m + tl.log2(total)) / LOG2_E)


@triton.jit
def attention_dq(
    QKV, GradOut, Lse, Delta, GradQKV, stride_row, stride_slot, stride_head, N, softmax_scale, qk_scale,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    base = QKV + batch.to(tl.int64) * N * stride_row + head * stride_head
    o_d = tl.arange(0, D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_out = ((batch.to(tl.int64) * N + rows[:, None]) * H + head) * D + o_d[None, :]
    q = tl.load(base + rows[:, None] * stride_row + o_d[None, :])
    do = tl.load(GradOut + o_out)
    lse = tl.load(Lse + tl.program_id(1).to(tl.int64) * N + rows) * LOG2_E
    delta = tl.load(Delta + tl.program_id(1).to(tl.int64) * N + rows)
    dq = tl.zeros([ROWS, D], tl.float32)
    p_k = base + stride_slot + tl.arange(0, STREAMED)[:, None] * stride_row + o_d[None, :]
    for _ in range(N // STREAMED):
        k = tl.load(p_k)
        v = tl.load(p_k + stride_slot)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * qk_scale - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
        p_k += STREAMED * stride_row
    o_dq = ((batch.to(tl.int64) * N + rows[:, None]) * 3 * H + head) * D + o_d[None, :]
    tl.store(GradQKV + o_dq, (dq * softmax_scale).to(GradQKV.dtype.element_ty))


@triton.jit
def attention_dkdv(
    QKV, GradOut, Lse, Delta, GradQKV, stride_row, stride_slot, stride_head, N, softmax_scale, qk_scale,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    base = QKV + batch.to(tl.int64) * N * stride_row + head * stride_head
    o_d = tl.arange(0, D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    p_k = base + stride_slot + rows[:, None] * stride_row + o_d[None, :]
    k = tl.load(p_k)
    v = tl.load(p_k + stride_slot)
    dk = tl.zeros([ROWS, D], tl.float32)
    dv = tl.zeros([ROWS, D], tl.float32)
    o_q = tl.arange(0, STREAMED)
    p_q = base + o_q[:, None] * stride_row + o_d[None, :]
    p_do = GradOut + ((batch.to(tl.int64) * N + o_q[:, None]) * H + head) * D + o_d[None, :]
    p_lse = Lse + tl.program_id(1).to(tl.int64) * N + o_q
    p_delta = Delta + tl.program_id(1).to(tl.int64) * N + o_q
    for _ in range(N // STREAMED):
        q = tl.load(p_q)
        do = tl.load(p_do)
        p = tl.exp2(
            tl.dot(k, tl.trans(q)) * qk_scale - (tl.load(p_lse) * LOG2_E)[None, :]
        )  # transposed: [keys, queries]
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - tl.load(p_delta)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
        p_q += STREAMED * stride_row
        p_do += STREAMED * H * D
        p_lse += STREAMED
        p_delta += STREAMED
    p_dk = GradQKV + (((batch.to(tl.int64) * N + rows[:, None]) * 3 + 1) * H + head) * D + o_d[None, :]
    tl.store(p_dk, (dk * softmax_scale).to(GradQKV.dtype.element_ty))
    tl.store(p_dk + H * D, dv.to(GradQKV.dtype.element_ty))
