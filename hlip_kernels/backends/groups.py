"""What a backend is told about the groups of a level."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import TILE_ROWS


class Groups(NamedTuple):
    """The groups of one level.

    cu_seqlens: (G + 1) int32 - bounds of the groups in the patch stream.
    tiles: for each of `TILE_ROWS`, (NT, 2) int32 - see `StudyLayout.tiles`.
    num_prefix: P, prefix rows of every group.
    max_seqlen: patch tokens of the longest group.
    """

    cu_seqlens: Tensor
    tiles: list[Tensor]
    num_prefix: int
    max_seqlen: int

    def tile_map(self, rows: int) -> Tensor:
        return self.tiles[TILE_ROWS.index(rows)]


def check_tensor(
    name: str, x: Tensor | None, shape: tuple[int, ...], device: torch.device, *dtypes: torch.dtype
) -> None:
    """Confirm that a tensor, if there is one, is what a kernel takes it for: it would leave the memory of another.

    Raises:
        ValueError: it is not.
    """
    if x is not None and (x.shape != shape or x.dtype not in dtypes or x.device != device):
        kinds, got = " or ".join(map(_name, dtypes)), f"{_name(x.dtype)} {tuple(x.shape)} on {x.device}"
        raise ValueError(f"{name}: expected {kinds} {tuple(shape)} on {device}, got {got}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_attention(
    qkv: Tensor,
    groups: Groups,
    softmax_scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    grad_out: Tensor | None = None,
) -> None:
    """Confirm that tensors belong together. On a GPU, what `cu_seqlens` and `tiles` hold stays unread.

    Raises:
        ValueError: they do not.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(f"qkv: expected (rows, 3, heads, head_dim), got {tuple(qkv.shape)}")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    rows, _, heads, head_dim = qkv.shape
    check_tensor("out", out, (rows, heads, head_dim), qkv.device, qkv.dtype)
    check_tensor("lse", lse, (heads, rows), qkv.device, wide_dtype(qkv.dtype))
    check_tensor("grad_out", grad_out, (rows, heads, head_dim), qkv.device, qkv.dtype)
    bounds, num_prefix = groups.cu_seqlens, groups.num_prefix
    check_tensor("cu_seqlens", bounds, (max(1, bounds.numel()),), qkv.device, torch.int32)
    patches = rows - (len(bounds) - 1) * num_prefix
    if num_prefix < 0 or (bounds.device.type == "cpu" and (bounds[0] != 0 or bounds[-1] != patches)):
        raise ValueError(
            f"cu_seqlens: expected bounds from 0 to {patches}, with {num_prefix} prefix rows, got {bounds}"
        )


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums and statistics are kept: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gpu_capability_reasons(device: str) -> list[str]:
    """Triton and FlashAttention ask for the same: an NVIDIA GPU of the Ampere generation or newer."""
    if device != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return []
    capability = torch.cuda.get_device_capability()
    if capability >= (8, 0):
        return []
    return ["needs a GPU of compute capability 8.0 or higher, got {}.{}".format(*capability)]


class Regroup(NamedTuple):
    """From the groups of one level, src, to those of another, dst; or of the same.

    cu_seqlens: (G_src + 1) int32 - bounds of the groups of src in the patch stream.
    tiles: (NT, 2) int32 - the tile map of src at the least of `TILE_ROWS`.
    children: (G of the coarser level + 1) int32 - bounds of each coarse group's run of fine ones; None if the levels
        are the same.
    num_prefix: P, prefix rows of every group.
    dst_groups: G_dst.
    """

    cu_seqlens: Tensor
    tiles: Tensor
    children: Tensor | None
    num_prefix: int
    dst_groups: int

    @property
    def src_groups(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def coarser(self) -> bool:
        """Whether dst is the coarser level, whose prefix rows are means of those of src."""
        return self.children is not None and self.dst_groups == self.children.shape[0] - 1


_FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64
_SINGLE, _WHOLE = (torch.float32,), (torch.int32,)
_OF_NORM = {  # the shape and the dtypes of every tensor of a norm
    **dict.fromkeys(("residual", "grad_residual"), ("rows of src", "x")),
    **dict.fromkeys(("update", "grad_update"), ("rows of src", "y")),
    **dict.fromkeys(("x", "grad_x"), ("rows of dst", "x")),
    **dict.fromkeys(("y", "grad_y"), ("rows of dst", "y")),
    **dict.fromkeys(("mean", "rstd"), ("a number a row", "float32")),
    **dict.fromkeys(("layer_scale", "weight", "bias"), ("a number a column", "any")),
    "path_scale": ("a number a group", "any"),
    "sums": ("three a column", "float32"),
    "cu_seqlens": ("bounds of src", "int32"),
    "children": ("bounds of children", "int32"),
}


def check_norm(regroup: Regroup | None, tokens: int, rows_x: Tensor, rows_y: Tensor, **tensors: Tensor | None) -> None:
    """Confirm that the tensors of a norm, by the names of `struct Norm` in rows.h, belong together.

    Args:
        regroup: None if there are patches only.
        rows_x, rows_y: whose dtypes are those of residuals and of updates.

    Raises:
        ValueError: they do not.
    """
    src_groups = dst_groups = num_prefix = 0
    if regroup is not None:
        src_groups, dst_groups, num_prefix = regroup.src_groups, regroup.dst_groups, regroup.num_prefix
        tensors |= {"cu_seqlens": regroup.cu_seqlens, "children": regroup.children}
    src, dst = (groups * num_prefix + tokens for groups in (src_groups, dst_groups))
    width = rows_x.shape[1]
    shapes = {
        "rows of src": (src, width), "rows of dst": (dst, width), "a number a row": (dst,),
        "a number a column": (width,), "a number a group": (src_groups,), "three a column": (3, width),
        "bounds of src": (src_groups + 1,), "bounds of children": (min(src_groups, dst_groups) + 1,),
    }  # fmt: skip
    dtypes = {"x": (rows_x.dtype,), "y": (rows_y.dtype,), "any": _FLOATS, "float32": _SINGLE, "int32": _WHOLE}
    for name, tensor in tensors.items():
        if tensor is not None:
            shape, kind = _OF_NORM[name]
            check_tensor(name, tensor, shapes[shape], rows_x.device, *dtypes[kind])
    if tokens < 0 or (tensors.get("children") is None and src_groups != dst_groups):
        raise ValueError(f"expected groups of one level, or children: {src_groups} to {dst_groups}, {tokens} tokens")
    if tensors.get("layer_scale") is not None and tensors.get("update") is None:
        raise ValueError("update: expected rows, as there is a layer_scale, got None")
