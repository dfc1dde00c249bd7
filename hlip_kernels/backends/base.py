"""The protocol of backends, and the description of groups that they are given.

A backend is one class in one file, and one line in `backends/__init__.py`. Its methods are abstract here: one that is
missing is an error when the package is imported.

Shapes: R rows, G groups, P prefix rows a group, H heads, D head dim, C width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..layout import TILE_ROWS

Repeats = Literal["always", "on request", "never"]
QKV = tuple[Tensor, Tensor, Tensor]


class Spans(NamedTuple):
    """Where the rows of each group lie in a tensor, in the terms of flash-attn.

    cu_seqlens: (G + 1) int32 - group g begins at row `cu_seqlens[g]`, and ends before `cu_seqlens[g + 1]`.
    tiles: for each of `TILE_ROWS`, (NT, 2) int32 - see `StudyLayout.tiles`; of the rows that are used, all of them.
    max_seqlen: rows of the longest group that are used.
    seqused: (G) int32 - how many rows, from the first, group g has; None for all up to the next group. With the tensor
        taken from its row P on, `x[P:]`, the rows used may be a group's patches.
    """

    cu_seqlens: Tensor
    tiles: list[Tensor]
    max_seqlen: int
    seqused: Tensor | None = None

    def tile_map(self, rows: int) -> Tensor:
        return self.tiles[TILE_ROWS.index(rows)]


class AttentionBackend(ABC):
    """softmax(q k^T * softmax_scale) v within groups: the rows of a group in `queries` attend to those in `keys`.

    Rows that are in no group are neither read nor written. q and out, and k and v, have the same numbers of rows. No
    tensor needs to be contiguous: q, k, v may be the slots of one packed tensor.

    name: as users write it.
    repeats: whether results, gradients included, are the same bits on every run. "on request": backward is told.
    """

    name: ClassVar[str]
    repeats: ClassVar[Repeats] = "always"

    @abstractmethod
    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        """List why it cannot run on tensors of this device type, dtype and head dim; empty if it can."""

    def not_repeating_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        """List why results there are not the same bits on every run, though they are asked to be; empty if they are."""
        return ["its gradients are not the same bits on every run"] if self.repeats == "never" else []

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out (R, H, D), contiguous, and lse (H, R): the logarithm of each softmax's denominator.

        A group without keys gives its queries 0, and a lse of minus infinity.
        """

    @abstractmethod
    def backward(
        self,
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
        deterministic: bool,
    ) -> None:
        """Write the gradients of q, k and v into `grads`, which are new memory: often slots of one packed tensor."""


class Regroup(NamedTuple):
    """From the groups of one level, src, to those of another, dst; or of the same.

    src: (G_src + 1) int32 - bounds of the groups of src, in rows of its tensor.
    dst: (G_dst + 1) int32 - the same of dst.
    tiles: (NT, 2) int32 - the tile map of the finer of the two at the least of `TILE_ROWS`.
    children: (G of the coarser level + 1) int32 - bounds of each coarse group's run of fine ones; None if the levels
        are the same.
    parents: (G of the finer level) int32 - the coarse group of each fine one; None with `children`.
    num_prefix: P, prefix rows of every group.
    coarser: whether dst is the coarser level, whose prefix rows are means of those of src. It is told, as the
        numbers of groups do not tell where every coarse group has one fine group.
    """

    src: Tensor
    dst: Tensor
    tiles: Tensor
    children: Tensor | None
    parents: Tensor | None
    num_prefix: int
    coarser: bool

    @property
    def src_groups(self) -> int:
        return self.src.shape[0] - 1

    @property
    def dst_groups(self) -> int:
        return self.dst.shape[0] - 1

    @property
    def rows_added(self) -> int:
        """Rows of dst less those of src."""
        return (self.dst_groups - self.src_groups) * self.num_prefix

    @property
    def fine_and_coarse(self) -> tuple[Tensor, Tensor]:
        """The bounds of the finer level's groups and of the coarser one's."""
        return (self.src, self.dst) if self.coarser else (self.dst, self.src)

    @property
    def families(self) -> int:
        """Prefix rows of the coarser level, if rows change level; each has a family of rows of the finer one."""
        return 0 if self.children is None else (self.children.shape[0] - 1) * self.num_prefix


class NormBackend(ABC):
    """Residual add, regroup and LayerNorm; see `add_regroup_norm`.

    name: as users write it.
    """

    name: ClassVar[str]

    @abstractmethod
    def not_supported_reasons(self, device: str, dtype: torch.dtype, update_dtype: torch.dtype) -> list[str]:
        """List why it cannot run on residuals and updates of these dtypes; empty if it can."""

    @abstractmethod
    def forward(
        self,
        residual: Tensor,
        update: Tensor,
        path_scale: Tensor | None,
        layer_scale: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        regroup: Regroup,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x (R_dst, C), y (R_dst, C), mean (R_dst) and rstd (R_dst), the last two in `wide_dtype`."""

    @abstractmethod
    def backward(
        self,
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
        """Return the gradients of residual, update, layer_scale, weight and bias.

        That of update is empty where it equals that of residual, and that of layer_scale where there is none.
        """


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums and statistics are kept: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shares_gradient(x: Tensor, grad_y: Tensor, path_scale: Tensor | None, layer_scale: Tensor | None) -> bool:
    """Tell whether one gradient serves residual and update: nothing scales the update, and the dtypes agree."""
    return path_scale is None and layer_scale is None and grad_y.dtype == x.dtype


def gpu_capability_reasons(device: str) -> list[str]:
    """Triton and FlashAttention ask for the same: an NVIDIA GPU of the Ampere generation or newer."""
    if device != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return []
    capability = torch.cuda.get_device_capability()
    if capability >= (8, 0):
        return []
    return ["needs a GPU of compute capability 8.0 or higher, got {}.{}".format(*capability)]


def check_tensor(
    name: str, x: Tensor | None, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype
) -> None:
    """Confirm that a tensor, if there is one, is what a kernel takes it for: it would leave the memory of another.

    Raises:
        ValueError: it is not.
    """
    _check_tensors(device, [(name, x, shape, dtypes)])


def _check_tensors(
    device: torch.device, expected: Iterable[tuple[str, Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]]
) -> None:
    """Each with its name, shape and dtypes. A launch waits for this loop: text is made where there is a fault."""
    for name, x, shape, dtypes in expected:
        if x is not None and (x.shape != shape or x.dtype not in dtypes or x.device != device):
            kinds, got = " or ".join(map(_name, dtypes)), f"{_name(x.dtype)} {tuple(x.shape)} on {x.device}"
            raise ValueError(f"{name}: expected {kinds} {tuple(shape)} on {device}, got {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Spans,
    keys: Spans,
    softmax_scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    grad_out: Tensor | None = None,
    grads: QKV | None = None,
) -> None:
    """Confirm that tensors belong together. What `cu_seqlens`, `seqused` and `tiles` hold stays unread.

    Raises:
        ValueError: they do not.
    """
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q: expected (rows, heads, head_dim), got {tuple(q.shape)}")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    rows, heads, head_dim = q_shape = q.shape
    kv_shape = (k.shape[0] if k.dim() else 0, heads, head_dim)
    same, wide = (q.dtype,), (wide_dtype(q.dtype),)
    grad_q, grad_k, grad_v = grads or (None, None, None)
    expected = [
        ("k", k, kv_shape, same), ("v", v, kv_shape, same), ("out", out, q_shape, same),
        ("lse", lse, (heads, rows), wide), ("grad_out", grad_out, q_shape, same), ("grad_q", grad_q, q_shape, same),
        ("grad_k", grad_k, kv_shape, same), ("grad_v", grad_v, kv_shape, same),
    ]  # fmt: skip
    groups = max(0, queries.cu_seqlens.numel() - 1)
    expected.append(("cu_seqlens of queries", queries.cu_seqlens, (groups + 1,), _WHOLE))
    expected.append(("seqused of queries", queries.seqused, (groups,), _WHOLE))
    if keys is not queries:
        expected.append(("cu_seqlens of keys", keys.cu_seqlens, (groups + 1,), _WHOLE))
        expected.append(("seqused of keys", keys.seqused, (groups,), _WHOLE))
    _check_tensors(q.device, expected)


def bounds_on_host(name: str, spans: Spans, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of each group, (G) int64 each; reads `cu_seqlens` back, so for CPU tensors only.

    Raises:
        ValueError: groups that do not follow one another within `rows` rows, or leave rows out without `seqused`.
    """
    bounds = spans.cu_seqlens.numpy().astype(np.int64)
    room = np.diff(bounds)
    used = room if spans.seqused is None else spans.seqused.numpy().astype(np.int64)
    begin, whole = bounds[:-1], bounds[0] == 0 and bounds[-1] == rows
    rise = (used >= 0).all() and (used <= room).all() and (begin[:1] >= 0).all() and (begin + used <= rows).all()
    if not rise or (spans.seqused is None and not whole):
        raise ValueError(
            f"cu_seqlens of {name}: expected bounds that rise from 0 to {rows} rows, and no more rows used than there "
            f"are, got {spans.cu_seqlens}, seqused {spans.seqused}"
        )
    return begin, used


FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
_SINGLE, _WHOLE = (torch.float32,), (torch.int32,)
_OF_NORM = {  # the shape and the dtypes of every tensor that a norm reads
    "residual": ("rows of src", "x"),
    "update": ("rows of src", "y"),
    **dict.fromkeys(("x", "grad_x"), ("rows of dst", "x")),
    "grad_y": ("rows of dst", "y"),
    **dict.fromkeys(("mean", "rstd"), ("a number a row", "float32")),
    **dict.fromkeys(("layer_scale", "weight", "bias"), ("a number a column", "any")),
    "path_scale": ("a number a group", "any"),
    "src": ("bounds of src", "int32"),
    "dst": ("bounds of dst", "int32"),
    "children": ("bounds of children", "int32"),
    "parents": ("a number a fine group", "int32"),
}


def check_norm(
    regroup: Regroup | None, src_rows: int, rows_x: Tensor, rows_y: Tensor, **tensors: Tensor | None
) -> None:
    """Confirm that the tensors a norm reads, named as in `NormBackend` and `Regroup`, belong together. What those of
    `regroup` hold stays unread.

    Args:
        regroup: None if rows stay where they are.
        src_rows: R_src.
        rows_x, rows_y: whose dtypes are those of residuals and of updates.

    Raises:
        ValueError: they do not.
    """
    src_groups = dst_groups = num_prefix = 0
    coarser = False
    if regroup is not None:
        bounds, dst_bounds, _, children, parents, num_prefix, coarser = regroup
        src_groups, dst_groups = bounds.shape[0] - 1, dst_bounds.shape[0] - 1
        tensors |= {"src": bounds, "dst": dst_bounds, "children": children, "parents": parents}
    src, dst, width = src_rows, src_rows + (dst_groups - src_groups) * num_prefix, rows_x.shape[-1]
    fine, coarse = (src_groups, dst_groups) if coarser else (dst_groups, src_groups)
    shapes = {
        "rows of src": (src, width), "rows of dst": (dst, width), "a number a row": (dst,),
        "a number a column": (width,), "a number a group": (src_groups,), "bounds of src": (src_groups + 1,),
        "bounds of dst": (dst_groups + 1,), "bounds of children": (coarse + 1,), "a number a fine group": (fine,),
    }  # fmt: skip
    dtypes = {"x": (rows_x.dtype,), "y": (rows_y.dtype,), "any": FLOATS, "float32": _SINGLE, "int32": _WHOLE}
    expected = []
    for name, tensor in tensors.items():
        if tensor is not None:
            shape, kind = _OF_NORM[name]
            expected.append((name, tensor, shapes[shape], dtypes[kind]))
    _check_tensors(rows_x.device, expected)
    if tensors.get("children") is None and src_groups != dst_groups:
        raise ValueError(f"children: expected bounds of runs, from {src_groups} groups to {dst_groups}, got None")
    if (tensors.get("children") is None) != (tensors.get("parents") is None):
        raise ValueError("children and parents: expected both or none, got one of them")
    if coarser and tensors.get("children") is None:
        raise ValueError("coarser: expected False, as without children the levels are the same, got True")
    if num_prefix < 0 or src_rows < src_groups * num_prefix:
        raise ValueError(f"expected {src_groups} times {num_prefix} prefix rows, and patches, got {src_rows} rows")
    if tensors.get("layer_scale") is not None and tensors.get("update") is None:
        raise ValueError("update: expected rows, as there is a layer_scale, got None")
