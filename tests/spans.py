"""Groups as backends are told of them, and few queries a group that attend to its patches where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hlip_kernels.backends.base import AttentionBackend, Spans
from hlip_kernels.layout import TILE_ROWS

HEADS = 2
SCALE = 0.3


def plain_spans(lengths: Sequence[int], num_prefix: int = 0, used: Sequence[int] | None = None) -> Spans:
    """What a backend is told of groups of `num_prefix` rows and so many patches each: tiles in the order of groups.

    used: how many rows of each group are to be used, if not all.
    """
    rows_of = [n + num_prefix for n in lengths]
    maps = []
    for rows in TILE_ROWS:
        tiles = [(g, first) for g, n in enumerate(used or rows_of) for first in range(0, n, rows)]
        maps.append(torch.tensor(tiles, dtype=torch.int32).reshape(-1, 2))
    cu_seqlens = torch.tensor(list(accumulate(rows_of, initial=0)), dtype=torch.int32)
    seqused = None if used is None else torch.tensor(used, dtype=torch.int32)
    return Spans(cu_seqlens, maps, max(used or rows_of, default=0), seqused)


def check_few_queries(
    backend: AttentionBackend,
    dtype: torch.dtype,
    head_dim: int = 32,
    num_queries: Sequence[int] = (3, 1, 0, 5, 40, 2),
    num_patches: Sequence[int] = (70, 1, 7, 0, 130, 197),
    num_prefix: int = 2,
    deterministic: bool = False,
) -> None:
    """Queries of their own attend to the patches of studies, whose prefix rows hold NaN: in place, against float64.

    The error is at most that of eager PyTorch in the same dtype, 2 times over for out and 3 times for gradients, and
    one rounding.
    """
    generator = torch.Generator().manual_seed(0)
    groups = plain_spans(num_patches, num_prefix)
    num_rows = int(groups.cu_seqlens[-1])
    kv = torch.full((num_rows, 2, HEADS, head_dim), torch.nan, dtype=dtype)
    keys = plain_spans(num_patches, num_prefix, num_patches)
    queries = plain_spans(num_queries)
    bounds = [slice(a + num_prefix, b) for a, b in pairwise(groups.cu_seqlens.tolist())]
    for rows in bounds:
        kv[rows] = torch.randn(kv[rows].shape, generator=generator).to(dtype)
    q = torch.randn(sum(num_queries), 3, HEADS, head_dim, generator=generator).to(dtype)[:, 1]  # rows lie apart
    grad_out = torch.randn(q.shape, generator=generator).to(dtype)
    q_bounds = [slice(a, b) for a, b in pairwise(accumulate(num_queries, initial=0))]
    exact, eager = (_dense(*(x.to(d) for x in (q, kv, grad_out)), q_bounds, bounds) for d in (torch.float64, dtype))

    k, v = kv[num_prefix:].unbind(1)
    out, lse = backend.forward(q, k, v, queries, keys, SCALE)
    grad_q, grad_kv = torch.full_like(q, torch.nan), torch.full_like(kv, torch.nan)
    grads = grad_q, *grad_kv[num_prefix:].unbind(1)
    backend.backward(grads, grad_out, q, k, v, out, lse, queries, keys, SCALE, deterministic)
    assert torch.isneginf(lse[:, q_bounds[3]]).all()
    untouched = torch.ones(num_rows, dtype=torch.bool)
    for rows in bounds:
        untouched[rows] = False
    assert grad_kv[untouched].isnan().all(), "rows in no group were written"
    got = out, lse, grad_q, grad_kv[~untouched]
    for name, x, y, z in zip(("out", "lse", "grad_q", "grad_kv"), got, eager, exact, strict=True):
        finite = torch.isfinite(z)
        error, allowed = (((a.double() - z)[finite]).abs().max() for a in (x, y))
        rounding = torch.finfo(dtype).eps / 2 * z[finite].abs().max()
        factor = 3 if name.startswith("grad") else 2
        assert error <= factor * allowed + rounding, f"{name}: error {error:.3g}, eager {allowed:.3g}"


def _dense(
    q: Tensor, kv: Tensor, grad_out: Tensor, q_bounds: Sequence[slice], k_bounds: Sequence[slice]
) -> tuple[Tensor, ...]:
    """out, lse, and the gradients of q and of the rows of kv that are used."""
    q, kv = q.detach().requires_grad_(), torch.cat([kv[rows] for rows in k_bounds]).requires_grad_()
    outs, lses = [], []
    parts = kv.split([rows.stop - rows.start for rows in k_bounds])
    for rows, (k, v) in zip(q_bounds, (part.unbind(1) for part in parts), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q[rows], k) * SCALE
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    out = torch.cat(outs)
    return out.detach(), torch.cat(lses, 1).detach(), *torch.autograd.grad(out, (q, kv), grad_out)
