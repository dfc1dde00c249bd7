"""Calls of the Triton backend in a process that has the stub driver, and what they launched: for `test_launch.py`.

Nothing here may import conftest, which has kernels run in the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchlib import stub_driver
from benchlib.stub_driver import Launch, Launches, Memory, memory_of
from fake_cuda import fake_mode
from hlip_kernels import Grid, Level, StudyLayout, add_regroup_norm, hier_attention
from hlip_kernels.backends import BACKENDS, NORM_BACKENDS
from hlip_kernels.backends.base import QKV, Regroup, Spans
from hlip_kernels.layout import TILE_ROWS
from hlip_kernels.norm import _regroup
from spans import plain_spans

SCALE = 0.3
GRIDS: list[list[Grid]] = [[(2, 14, 14), (3, 4, 5)], [(1, 1, 1)], [(2, 5, 7)] * 2]
WAY: tuple[Level, ...] = ("slice", "slice", "scan", "study", "scan", "slice", "study", "slice")  # all changes of level

launched = Launches()


class Run(NamedTuple):
    """given: the tensors that a call was given or returned, as the kernels call them; a tile map with its rows."""

    given: dict[str, Memory | None]
    launches: list[Launch]


class Attention(NamedTuple):
    """offset: elements in front of qkv, in the memory that it lies in. gap: elements between its rows."""

    dtype: torch.dtype = torch.bfloat16
    level: Level = "scan"
    num_prefix: int = 1
    heads: int = 2
    head_dim: int = 64
    offset: int = 0
    gap: int = 0
    device: str = "cpu"


class Norm(NamedTuple):
    """path, layer: whether there is a path_scale, a layer_scale. offset: as in `Attention`, of residual and update."""

    dtype: torch.dtype = torch.bfloat16
    update_dtype: torch.dtype = torch.bfloat16
    src: Level = "slice"
    dst: Level = "scan"
    num_prefix: int = 1
    path: bool = False
    layer: bool = False
    width: int = 96
    offset: int = 0
    device: str = "cpu"


def start(architecture: str) -> None:
    global launched
    launched = stub_driver.install(architecture)


def current_device() -> int:
    return launched.device


def layout(num_prefix: int, grids: Sequence[Sequence[Grid]] = GRIDS) -> StudyLayout:
    return StudyLayout.from_grids(grids, num_prefix)


def attend(case: Attention) -> Run:
    """Attention within the groups of a level, forward and backward, on the slots of one packed tensor."""
    groups = layout(case.num_prefix)
    with _device(case.device):
        groups = groups.to(case.device)
        spans = Spans(groups.cu_seqlens(case.level), groups.tiles(case.level), groups.max_seqlen(case.level))
        qkv, grad = (_packed(groups.num_rows(case.level), case) for _ in range(2))
        return _attend(*qkv.unbind(1), spans, spans, grad.unbind(1))


def attend_apart(case: Attention) -> Run:
    """Few queries a group of their own attend to its patches, behind its prefix rows."""
    num_queries, num_patches = (3, 1, 0, 40), (70, 1, 7, 130)
    groups = plain_spans(num_patches, case.num_prefix)
    keys = plain_spans(num_patches, case.num_prefix, num_patches)
    kv, grad_kv = (_packed(int(groups.cu_seqlens[-1]), case) for _ in range(2))
    q, grad_q = (_packed(sum(num_queries), case)[:, 0] for _ in range(2))
    k, v = kv[case.num_prefix :, 1:].unbind(1)
    return _attend(q, k, v, plain_spans(num_queries), keys, (grad_q, *grad_kv[case.num_prefix :, 1:].unbind(1)))


def attend_unlike(case: Attention) -> Run:
    """Queries whose memory runs over heads first, and values in one of four slots."""
    spans = plain_spans([70, 7])
    q = torch.zeros(77, case.head_dim, case.heads, dtype=case.dtype).transpose(1, 2)
    v = torch.zeros(77, 4, case.heads, case.head_dim, dtype=case.dtype)[:, 1]
    k, *grads = (torch.zeros(77, case.heads, case.head_dim, dtype=case.dtype) for _ in range(4))
    return _attend(q, k, v, spans, spans, (grads[0], grads[1], grads[2]))


def attend_lengths(lengths: list[int], case: Attention) -> Run:
    spans = plain_spans(lengths)
    qkv, grad = (_packed(sum(lengths), case) for _ in range(2))
    return _attend(*qkv.unbind(1), spans, spans, grad.unbind(1))


def attend_singly(groups: int) -> Run:
    """That many groups of one row."""
    one = torch.stack([torch.arange(groups, dtype=torch.int32), torch.zeros(groups, dtype=torch.int32)], 1)
    spans = Spans(torch.arange(groups + 1, dtype=torch.int32), [one] * len(TILE_ROWS), 1)
    qkv, grad = (_packed(groups, Attention(heads=1, head_dim=16)) for _ in range(2))
    return _attend(*qkv.unbind(1), spans, spans, grad.unbind(1))


def normalise(case: Norm) -> Run:
    """A change of level, or none, forward and backward."""
    groups = layout(case.num_prefix)
    with _device(case.device):
        groups = groups.to(case.device)
        return _normalise(case, groups, _regroup(groups, case.src, case.dst))


def normalise_nothing(case: Norm) -> Run:
    bounds, tiles = torch.zeros(1, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32)
    return _normalise(case, None, Regroup(bounds, bounds, tiles, None, None, case.num_prefix, False))


def train(batches: Sequence[Sequence[Sequence[Grid]]], num_prefix: int) -> list[list[Launch]]:
    """Attention at every level and all changes of level, forward and backward, as users call them; what each batch
    launched."""
    launches = []
    weight, bias, layer_scale = (torch.ones(64, requires_grad=True) for _ in range(3))
    for grids in batches:
        groups = layout(num_prefix, grids)
        residual = torch.ones(groups.num_rows("slice"), 64, requires_grad=True)
        x, update = residual, residual.bfloat16()
        for src, dst in pairwise(WAY):
            paths = torch.ones(groups.num_groups(src))
            qkv = torch.stack([update] * 3, 1).unflatten(2, (4, 16))
            update = hier_attention(qkv, groups, src, backend="triton").flatten(1)
            x, update = add_regroup_norm(
                x, update, groups, src, dst, weight, bias,
                path_scale=paths, layer_scale=layer_scale, backend="triton",
            )  # fmt: skip
        (x.sum() + update.sum()).backward()
        launches.append(_take())
    return launches


def _device(device: str) -> Any:
    """Fake tensors, if it is a GPU."""
    return nullcontext() if device == "cpu" else fake_mode()


def _packed(rows: int, case: Attention) -> Tensor:
    width = 3 * case.heads * case.head_dim
    buffer = torch.zeros(case.offset + rows * (width + case.gap), dtype=case.dtype, device=case.device)
    strides = width + case.gap, case.heads * case.head_dim, case.head_dim, 1
    return buffer.as_strided((rows, 3, case.heads, case.head_dim), strides, case.offset)


def _attend(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, grads: QKV) -> Run:
    backend = BACKENDS["triton"]
    out, lse = backend.forward(q, k, v, queries, keys, SCALE)
    grad_out = torch.zeros_like(out)
    backend.backward(grads, grad_out, q, k, v, out, lse, queries, keys, SCALE, True)
    tensors = {
        "Q": q, "K": k, "V": v, "Out": out, "Lse": lse, "GradOut": grad_out,
        **dict(zip(("GradQ", "GradK", "GradV"), grads, strict=True)),
        "CuQueries": queries.cu_seqlens, "CuKeys": keys.cu_seqlens,
        "UsedQueries": queries.seqused, "UsedKeys": keys.seqused,
    }  # fmt: skip
    maps = {f"{name} {rows}": spans.tile_map(rows) for name, spans in (("queries", queries), ("keys", keys))
            for rows in TILE_ROWS}  # fmt: skip
    return _run(tensors | maps)


def _normalise(case: Norm, groups: StudyLayout | None, regroup: Regroup) -> Run:
    rows = 0 if groups is None else groups.num_rows(case.src)
    residual, update = (
        torch.zeros(case.offset + rows * case.width, dtype=dtype, device=case.device)[case.offset :].view(rows, -1)
        if rows
        else torch.zeros(0, case.width, dtype=dtype)
        for dtype in (case.dtype, case.update_dtype)
    )
    weight, bias = (torch.ones(case.width, device=case.device) for _ in range(2))
    path_scale = torch.ones(regroup.src_groups, device=case.device) if case.path else None
    layer_scale = torch.ones(case.width, device=case.device) if case.layer else None
    backend = NORM_BACKENDS["triton"]
    x, y, mean, rstd = backend.forward(residual, update, path_scale, layer_scale, weight, bias, regroup, 1e-6)
    grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
    kept = update if case.layer else None
    grad_residual, grad_update, *_ = backend.backward(
        grad_x, grad_y, x, mean, rstd, kept, path_scale, layer_scale, weight, regroup
    )
    fine, coarse = regroup.fine_and_coarse
    return _run(
        {
            "Residual": residual, "Update": update, "PathScale": path_scale, "LayerScale": layer_scale,
            "Weight": weight, "Bias": bias, "X": x, "Y": y, "Mean": mean, "Rstd": rstd,
            "GradX": grad_x, "GradY": grad_y, "GradResidual": grad_residual,
            "GradUpdate": grad_update if grad_update.numel() else None,
            "Tiles": regroup.tiles, "Fine": fine, "Coarse": coarse,
            "Children": regroup.children, "Parents": regroup.parents,
        }
    )  # fmt: skip


def _run(tensors: dict[str, Tensor | None]) -> Run:
    return Run({name: None if x is None else memory_of(x) for name, x in tensors.items()}, _take())


def _take() -> list[Launch]:
    """Those since the last time."""
    launches = list(launched)
    launched.clear()
    return launches
