"""Residual add, regroup and LayerNorm in one pass, forward and backward, in Triton.

Shapes: R = G * P + T rows, G groups, P prefix rows a group, T patch tokens, C width.

A program takes a tile of rows of one group of the finer of the two levels. They follow one another at both levels, so
its rows at the coarser one are a shift away; on the way to a finer level, a group's prefix rows are read from those of
its coarse group. Means of prefix rows, and in backward all prefix rows of a change of level, have programs of their
own, one for each coarse group and prefix place: it owns that row, and all its fine rows. Every row is thus written by
one program, without atomics; sums over rows, for the parameters' gradients, are kept per program and added up in a
fixed order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import TILE_ROWS
from .base import Regroup, check_norm, shares_gradient

ROWS = TILE_ROWS[0]  # of the tile maps
# What differs from batch to batch must not make the compiler specialise: it would compile anew for mixes of studies.
VARYING = ["first_partial"]
MAPS = ["Tiles", "Fine", "Coarse", "Children", "Parents"]


@triton.jit
def _tile(Tiles, Fine, Parents, P, ROWS: tl.constexpr):
    """A program's rows.

    Returns the fine group and its coarse one (or itself, if the levels are the same), the first row and its place in
    the group, how many rows there are, and by how much rows of patches are shifted at the coarser level.
    """
    entry = Tiles + 2 * tl.program_id(0).to(tl.int64)
    fine = tl.load(entry).to(tl.int64)
    place = tl.load(entry + 1)
    first = tl.load(Fine + fine).to(tl.int64) + place
    num_rows = tl.minimum(tl.load(Fine + fine + 1) - first, ROWS).to(tl.int32)
    coarse = fine
    if Parents is not None:
        coarse = tl.load(Parents + fine).to(tl.int64)
    return fine, coarse, first, place, num_rows, (coarse - fine) * P


@triton.jit
def _scaled(b_u, b_layer, path, LayerScale, PathScale):
    if LayerScale is not None:
        b_u = b_u * b_layer[None, :]
    if PathScale is not None:
        b_u = b_u * path
    return b_u


@triton.jit
def _vector(Pointer, o_c, m_c):
    """(C) values, or zeros in place of an absent tensor."""
    if Pointer is not None:
        return tl.load(Pointer + o_c, mask=m_c, other=0.0).to(tl.float32)
    return tl.zeros(o_c.shape, tl.float32)


@triton.jit
def _write_normalised(b_x, X, Y, Mean, Rstd, row, m_row, b_w, b_b, o_c, m_c, eps, C: tl.constexpr):
    """Store rows b_x [S, BLOCK_C] as the residual, and normalised."""
    m = m_row[:, None] & m_c[None, :]
    o = row[:, None] * C + o_c[None, :]
    b_x = b_x.to(X.dtype.element_ty)
    tl.store(X + o, b_x, mask=m)
    b_x = b_x.to(tl.float32)
    b_mean = tl.sum(b_x, 1) / C
    b_centred = tl.where(m_c[None, :], b_x - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / C + eps)
    b_y = b_centred * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
    tl.store(Y + o, b_y.to(Y.dtype.element_ty), mask=m)
    tl.store(Mean + row, b_mean, mask=m_row)
    tl.store(Rstd + row, b_rstd, mask=m_row)


@triton.jit(do_not_specialize_on_alignment=MAPS)
def norm_forward(
    Residual, Update, PathScale, LayerScale, Weight, Bias, X, Y, Mean, Rstd, Tiles, Fine, Coarse, Parents, P, eps,
    COARSER: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of a tile: all of them, but for prefix rows on the way to a coarser level."""
    fine, coarse, first, place, num_rows, shift = _tile(Tiles, Fine, Parents, P, ROWS)
    group = fine if COARSER else coarse
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_w = _vector(Weight, o_c, m_c)
    b_b = _vector(Bias, o_c, m_c)
    b_layer = _vector(LayerScale, o_c, m_c)
    path = 1.0
    if PathScale is not None:
        path = tl.load(PathScale + group).to(tl.float32)
    start, source, row = 0, first, first
    if COARSER:
        start = tl.maximum(P - place, 0)
        row += shift
    elif Parents is not None:
        source += shift
        clones = tl.load(Coarse + coarse) + place - source  # from there to where the prefix rows are
    # Offsets from these are small: 64-bit ones of every row take registers that some compilers do not have.
    Residual += source * C
    Update += source * C
    X += row * C
    Y += row * C
    Mean += row
    Rstd += row
    o_one = tl.arange(0, 1)
    for at in range(start, num_rows):
        p_x, p_u = Residual, Update
        if Parents is not None and not COARSER:
            moved = tl.where(place + at < P, clones, 0) * C
            p_x += moved
            p_u += moved
        o = (at + o_one)[:, None] * C + o_c[None, :]
        b_u = tl.load(p_u + o, mask=m_c[None, :], other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o, mask=m_c[None, :], other=0.0).to(tl.float32)
        b_x += _scaled(b_u, b_layer, path, LayerScale, PathScale)
        _write_normalised(b_x, X, Y, Mean, Rstd, at + o_one, o_one == 0, b_w, b_b, o_c, m_c, eps, C)


@triton.jit
def _family(Children, Coarse, P):
    """A prefix program's coarse group and row, its place in the group, and its run of fine groups."""
    group = (tl.program_id(0) // P).to(tl.int64)
    place = tl.program_id(0) % P
    row = (tl.load(Coarse + group) + place).to(tl.int64) + tl.arange(0, 1)
    return group, row, place, tl.load(Children + group), tl.load(Children + group + 1)


@triton.jit
def _relatives(PathScale, Fine, at, end, place, SUB: tl.constexpr):
    """Rows of fine groups from `at`, which of them there are, and their groups' scales."""
    group = at + tl.arange(0, SUB)
    m_row = group < end
    row = (tl.load(Fine + group, mask=m_row, other=0) + place).to(tl.int64)
    path = 1.0
    if PathScale is not None:
        path = tl.load(PathScale + group, mask=m_row, other=0.0).to(tl.float32)[:, None]
    return row, m_row, path


@triton.jit(do_not_specialize_on_alignment=MAPS)
def prefix_forward(
    Residual, Update, PathScale, LayerScale, Weight, Bias, X, Y, Mean, Rstd, Fine, Coarse, Children, P, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One prefix row of a coarse group: the mean of its fine groups' rows."""
    _, own, place, begin, end = _family(Children, Coarse, P)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_w = _vector(Weight, o_c, m_c)
    b_b = _vector(Bias, o_c, m_c)
    b_layer = _vector(LayerScale, o_c, m_c)
    b_sum = tl.zeros([BLOCK_C], tl.float32)
    for at in range(begin, end, SUB):
        row, m_row, path = _relatives(PathScale, Fine, at, end, place, SUB)
        m = m_row[:, None] & m_c[None, :]
        o = row[:, None] * C + o_c[None, :]
        b_u = tl.load(Update + o, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(Residual + o, mask=m, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x + _scaled(b_u, b_layer, path, LayerScale, PathScale), 0)
    b_mean = (b_sum / (end - begin))[None, :]
    _write_normalised(b_mean, X, Y, Mean, Rstd, own, tl.arange(0, 1) == 0, b_w, b_b, o_c, m_c, eps, C)


@triton.jit
def _gradient(GradX, GradY, X, Mean, Rstd, row, m_row, b_w, b_gw, b_gb, o_c, m_c, C: tl.constexpr):
    """The gradient of rows [S, BLOCK_C] of the new residual; the parameters' gradients grow by those rows."""
    m = m_row[:, None] & m_c[None, :]
    o = row[:, None] * C + o_c[None, :]
    b_gy = tl.load(GradY + o, mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(X + o, mask=m, other=0.0).to(tl.float32)
    b_mean = tl.load(Mean + row, mask=m_row, other=0.0)
    b_rstd = tl.load(Rstd + row, mask=m_row, other=0.0)
    b_hat = tl.where(m, (b_x - b_mean[:, None]) * b_rstd[:, None], 0.0)
    b_gw += tl.sum(b_gy * b_hat, 0)
    b_gb += tl.sum(b_gy, 0)
    b_wgy = b_gy * b_w[None, :]
    b_inner = tl.sum(b_wgy * b_hat, 1) / C
    b_mean_gy = tl.sum(b_wgy, 1) / C
    b_g = (b_wgy - b_hat * b_inner[:, None] - b_mean_gy[:, None]) * b_rstd[:, None]
    if GradX is not None:
        b_g += tl.load(GradX + o, mask=m, other=0.0).to(tl.float32)
    return tl.where(m, b_g, 0.0), b_gw, b_gb


@triton.jit
def _write_gradient(b_g, GradResidual, GradUpdate, Update, PathScale, LayerScale, row, m_row, b_layer, path, b_gl,
                    o_c, m_c, C: tl.constexpr):  # fmt: skip
    """Store the gradient of rows of src as that of the residual and, scaled, as that of the update."""
    m = m_row[:, None] & m_c[None, :]
    o = row[:, None] * C + o_c[None, :]
    tl.store(GradResidual + o, b_g.to(GradResidual.dtype.element_ty), mask=m)
    if GradUpdate is not None:
        if LayerScale is not None:
            b_u = tl.load(Update + o, mask=m, other=0.0).to(tl.float32)
            b_gl += tl.sum(_scaled(b_g * b_u, b_layer, path, None, PathScale), 0)
        b_gu = _scaled(b_g, b_layer, path, LayerScale, PathScale)
        tl.store(GradUpdate + o, b_gu.to(GradUpdate.dtype.element_ty), mask=m)
    return b_gl


@triton.jit
def _write_partials(Partials, LayerScale, place, b_gw, b_gb, b_gl, o_c, m_c, C: tl.constexpr):
    SLOTS: tl.constexpr = 2 if LayerScale is None else 3
    p = Partials + place.to(tl.int64) * (SLOTS * C) + o_c
    tl.store(p, b_gw, mask=m_c)
    tl.store(p + C, b_gb, mask=m_c)
    if LayerScale is not None:
        tl.store(p + 2 * C, b_gl, mask=m_c)


@triton.jit(do_not_specialize_on_alignment=MAPS)
def norm_backward(
    GradX, GradY, X, Mean, Rstd, Update, PathScale, LayerScale, Weight, GradResidual, GradUpdate, Partials,
    Tiles, Fine, Parents, P,
    COARSER: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile's rows: all of them where the levels are the same, else the patches."""
    fine, coarse, first, place, num_rows, shift = _tile(Tiles, Fine, Parents, P, ROWS)
    group = fine if COARSER else coarse
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_w = _vector(Weight, o_c, m_c)
    b_layer = _vector(LayerScale, o_c, m_c)
    b_gw = tl.zeros([BLOCK_C], tl.float32)
    b_gb = tl.zeros([BLOCK_C], tl.float32)
    b_gl = tl.zeros([BLOCK_C], tl.float32)
    path = 1.0
    if PathScale is not None:
        path = tl.load(PathScale + group).to(tl.float32)
    start = 0
    if Parents is not None:
        start = tl.maximum(P - place, 0)
    o_one = tl.arange(0, 1)
    m_one = o_one == 0
    for at in range(start, num_rows):
        row = first + at + o_one
        target = row
        if COARSER:
            row += shift
        elif Parents is not None:
            target += shift
        b_g, b_gw, b_gb = _gradient(GradX, GradY, X, Mean, Rstd, row, m_one, b_w, b_gw, b_gb, o_c, m_c, C)
        b_gl = _write_gradient(
            b_g, GradResidual, GradUpdate, Update, PathScale, LayerScale, target, m_one, b_layer, path, b_gl, o_c,
            m_c, C,
        )  # fmt: skip
    _write_partials(Partials, LayerScale, tl.program_id(0), b_gw, b_gb, b_gl, o_c, m_c, C)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=MAPS)
def prefix_backward(
    GradX, GradY, X, Mean, Rstd, Update, PathScale, LayerScale, Weight, GradResidual, GradUpdate, Partials,
    Fine, Coarse, Children, P, first_partial,
    COARSER: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One prefix row of a coarse group: the gradient of a mean is shared out, those of clones are added up."""
    group, own, place, begin, end = _family(Children, Coarse, P)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_w = _vector(Weight, o_c, m_c)
    b_layer = _vector(LayerScale, o_c, m_c)
    b_gw = tl.zeros([BLOCK_C], tl.float32)
    b_gb = tl.zeros([BLOCK_C], tl.float32)
    b_gl = tl.zeros([BLOCK_C], tl.float32)
    m_own = tl.arange(0, 1) == 0
    if COARSER:
        b_g, b_gw, b_gb = _gradient(GradX, GradY, X, Mean, Rstd, own, m_own, b_w, b_gw, b_gb, o_c, m_c, C)
        b_share = tl.broadcast_to(b_g * (1.0 / (end - begin)), [SUB, BLOCK_C])
        for at in range(begin, end, SUB):
            row, m_row, path = _relatives(PathScale, Fine, at, end, place, SUB)
            b_gl = _write_gradient(
                b_share, GradResidual, GradUpdate, Update, PathScale, LayerScale, row, m_row, b_layer, path, b_gl, o_c,
                m_c, C,
            )  # fmt: skip
    else:
        b_sum = tl.zeros([BLOCK_C], tl.float32)
        for at in range(begin, end, SUB):
            row, m_row, _ = _relatives(None, Fine, at, end, place, SUB)
            b_g, b_gw, b_gb = _gradient(GradX, GradY, X, Mean, Rstd, row, m_row, b_w, b_gw, b_gb, o_c, m_c, C)
            b_sum += tl.sum(b_g, 0)
        path = 1.0
        if PathScale is not None:
            path = tl.load(PathScale + group).to(tl.float32)
        b_gl = _write_gradient(
            b_sum[None, :], GradResidual, GradUpdate, Update, PathScale, LayerScale, own, m_own, b_layer, path, b_gl,
            o_c, m_c, C,
        )  # fmt: skip
    _write_partials(Partials, LayerScale, first_partial + tl.program_id(0), b_gw, b_gb, b_gl, o_c, m_c, C)


def forward(
    residual: Tensor, update: Tensor, path_scale: Tensor | None, layer_scale: Tensor | None, weight: Tensor,
    bias: Tensor, regroup: Regroup, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    residual, update, path_scale, layer_scale, weight, bias = map(
        _contiguous, (residual, update, path_scale, layer_scale, weight, bias)
    )
    check_norm(
        regroup, residual.shape[0], residual, update, residual=residual, update=update, path_scale=path_scale,
        layer_scale=layer_scale, weight=weight, bias=bias,
    )  # fmt: skip
    num_rows, width, num_prefix = residual.shape[0] + regroup.rows_added, residual.shape[1], regroup.num_prefix
    x = residual.new_empty(num_rows, width)
    y = update.new_empty(num_rows, width)
    mean, rstd = (x.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    tensors = residual, update, path_scale, layer_scale, weight, bias, x, y, mean, rstd
    coarser, num_tiles, families = regroup.coarser, regroup.tiles.shape[0], regroup.families
    bounds = regroup.fine_and_coarse
    if coarser and families:
        prefix_forward[(families,)](*tensors, *bounds, regroup.children, num_prefix, eps, **_constants(width, True))
    if num_tiles:
        norm_forward[(num_tiles,)](
            *tensors, regroup.tiles, *bounds, regroup.parents, num_prefix, eps,
            COARSER=coarser, **_constants(width, False),
        )  # fmt: skip
    return x, y, mean, rstd


def backward(
    grad_x: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    update: Tensor | None,
    path_scale: Tensor | None,
    layer_scale: Tensor | None,
    weight: Tensor,
    regroup: Regroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_y, update, path_scale, layer_scale, weight = map(
        _contiguous, (grad_x, grad_y, update, path_scale, layer_scale, weight)
    )
    src_rows = x.shape[0] - regroup.rows_added
    check_norm(
        regroup, src_rows, x, grad_y, x=x, grad_x=grad_x, grad_y=grad_y, mean=mean, rstd=rstd, update=update,
        path_scale=path_scale, layer_scale=layer_scale, weight=weight,
    )  # fmt: skip
    width = x.shape[1]
    grad_residual = x.new_empty(src_rows, width)
    shared = shares_gradient(x, grad_y, path_scale, layer_scale)
    grad_update = None if shared else grad_y.new_empty(grad_residual.shape)
    coarser, num_tiles, families = regroup.coarser, regroup.tiles.shape[0], regroup.families
    fine, coarse = regroup.fine_and_coarse
    partials = x.new_empty(num_tiles + families, 2 if layer_scale is None else 3, width, dtype=torch.float32)
    tensors = (
        grad_x, grad_y, x, mean, rstd, update, path_scale, layer_scale, weight, grad_residual, grad_update, partials,
    )  # fmt: skip
    if families:
        prefix_backward[(families,)](
            *tensors, fine, coarse, regroup.children, regroup.num_prefix, num_tiles,
            COARSER=coarser, **_constants(width, True),
        )  # fmt: skip
    if num_tiles:
        norm_backward[(num_tiles,)](
            *tensors, regroup.tiles, fine, regroup.parents, regroup.num_prefix,
            COARSER=coarser, **_constants(width, False),
        )  # fmt: skip
    sums = [slot.sum(0) for slot in partials.unbind(1)]  # one by one: results must not share memory
    return (
        grad_residual,
        grad_y.new_empty(0) if grad_update is None else grad_update,
        weight.new_empty(0) if layer_scale is None else sums[2].to(layer_scale.dtype),
        sums[0].to(weight.dtype),
        sums[1].to(weight.dtype),
    )


def _contiguous(x: Any) -> Any:
    return None if x is None else x.contiguous()


@functools.cache
def _constants(width: int, prefix: bool) -> dict[str, Any]:
    """Of a launch; not to be changed, as it is made once.

    A thread holds 16 values of each tensor, or as few as 4: where rows are narrow, or means are taken, four warps are
    the least with which no Triton from 3.3 on spills. Programs of prefix rows are few and each has many rows to go
    through: two at a time. On sm_100, two rows of a tile at a time spill.
    """
    block = triton.next_power_of_2(width)
    rows = 2 if prefix else 1
    least = min(4, block // 128) if prefix or block <= 512 else 1
    warps = min(16, max(1, least, rows * block // 512))
    # Triton 3.10 no longer fuses products and sums by itself.
    constants = {"C": width, "BLOCK_C": block, "num_warps": warps, "enable_fp_fusion": True}
    return constants | ({"SUB": rows} if prefix else {"ROWS": ROWS})
