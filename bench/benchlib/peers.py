"""Attention within groups, our way and others': what `attention.py` times.

Every peer is given its tensors in the form that suits it best, outside of what is timed. Those of packed sequences get
the level's tensor as it lies in the model, group after group. Those of dense or padded groups get rows that a model of
packed studies would have to copy first, which favours them.

    hlip-NAME    `hier_attention` with one of its backends
    sdpa         PyTorch's scaled_dot_product_attention, one call for each group
    sdpa-dense   the same in one call, where all groups are of one length
    sdpa-cudnn   the same through cuDNN's kernels
    sdpa-flash   the same through PyTorch's own FlashAttention
    published    as sdpa-dense, and what the released encoder does beside it when the level changes: residual rows are
                 split, reshaped and concatenated to the level's groups (`baselines.regroup`)
    padded       one call, every group padded to the longest; a mask hides the padding
    block-mask   one call over all rows, with a block-diagonal mask
    flex         torch.nn.attention.flex_attention, compiled, with its block mask
    nested       scaled_dot_product_attention on nested tensors of jagged layout
    varlen       torch.nn.attention.varlen
    flash-attn   flash-attn's flash_attn_varlen_qkvpacked_func
    flash-attn-3 FlashAttention-3's flash_attn_varlen_func
    flash-attn-4 flash-attn-4's flash_attn_varlen_func
    xformers     xformers' memory_efficient_attention with its block-diagonal mask

Shapes: R rows, those of prefixes among them, G groups, L rows of a group, H heads, D head dim, C = H * D.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hlip_kernels import Level, hier_attention
from hlip_kernels.backends import BACKENDS, not_supported_reasons

from .baselines import regroup
from .problems import Problem


class Peer:
    """A way of attention. `put` gives tensors of rows, (R, H, D) in the order of the level's tensor, the form that it
    takes and returns, which is not timed. It only moves rows, so its gradient takes results back (`taken_back`). This
    one takes rows as they lie."""

    backend: str = ""  # ours that calls the same library, and knows why it would not run
    compiles: ClassVar[bool] = False  # in its first call, also without a GPU
    mask: Any = None

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def reasons(self) -> list[str]:
        """Why it cannot do this problem, as far as that is known before it is tried."""
        problem = self.problem
        given = problem.device, problem.dtype, problem.head_dim
        return not_supported_reasons(self.backend, *given) if self.backend else []

    def scratch(self, backward: bool) -> int:
        """An estimate of the bytes that it needs, those beyond a few copies of its inputs."""
        return 0

    def prepare(self) -> None:
        """What depends on the groups only, and is done once a batch: masks, bounds, maps."""

    def put(self, x: Tensor) -> list[Tensor]:
        return [x.contiguous()]

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        q, k, v = inputs
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)]

    def inputs(self, qkv: Tensor) -> list[Tensor]:
        """From (R, 3, H, D)."""
        return [tensor for x in qkv.unbind(1) for tensor in self.put(x)]

    def outputs(self, grad_out: Tensor) -> list[Tensor]:
        """The gradients of what `attend` returns."""
        return self.put(grad_out)


def taken_back(move: Callable[[Tensor], list[Tensor]], moved: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows of the shape of another tensor, from the form in which `move` lays them out."""
    rows = torch.empty_like(like, requires_grad=True)
    outputs = [x for x in move(rows) if x.requires_grad]  # rows of its own, which the published way has, come last
    return torch.autograd.grad(outputs, rows, moved[: len(outputs)])[0].detach()


class Whole(Peer):
    """(R, 3, H, D): q, k and v in one tensor, which saves the joining of gradients."""

    def inputs(self, qkv: Tensor) -> list[Tensor]:
        return self.put(qkv)


OWN = ("native", "cpu", "triton", "reference", "torch")  # of attention and norm; others call other libraries


class Ours(Whole):
    def __init__(self, problem: Problem, backend: str, deterministic: bool = False) -> None:
        super().__init__(problem)
        self.backend, self.deterministic = backend, deterministic

    def scratch(self, backward: bool) -> int:
        if self.backend != "reference":
            return 0
        return (5 if backward else 3) * self.problem.heads * int(self.problem.lengths.max()) ** 2 * 4

    def prepare(self) -> None:
        """One layout serves all levels, so this is more than the one level needs."""
        self.layout = self.problem.make().to(self.problem.device)

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        options: Any = {"backend": self.backend, "deterministic": self.deterministic}
        return [hier_attention(inputs[0], self.layout, self.problem.level, **options)]


class PerGroup(Peer):
    def put(self, x: Tensor) -> list[Tensor]:
        groups = x.split(self.problem.lengths.tolist())
        return [group.transpose(0, 1).contiguous()[None] for group in groups]  # (1, H, L, D)

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        count = len(self.problem.rows)
        groups = (inputs[g::count] for g in range(count))
        return [F.scaled_dot_product_attention(q, k, v) for q, k, v in groups]


class Dense(Peer):
    """(G, H, L, D)."""

    def reasons(self) -> list[str]:
        lengths = self.problem.lengths
        return [] if len(set(lengths.tolist())) == 1 else [f"groups differ: {lengths.min()} to {lengths.max()} rows"]

    def put(self, x: Tensor) -> list[Tensor]:
        return [x.unflatten(0, (len(self.problem.rows), -1)).transpose(1, 2).contiguous()]


class Forced(Dense):
    """Through one of the kernels that PyTorch chooses from, by its name in `SDPBackend`."""

    def __init__(self, problem: Problem, kernel: str) -> None:
        super().__init__(problem)
        self.kernel = kernel

    def reasons(self) -> list[str]:
        device = self.problem.device
        return [*([] if device == "cuda" else [f"needs CUDA tensors, got {device}"]), *super().reasons()]

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, self.kernel)):
            return super().attend(*inputs)


class Published(Dense):
    """Beside q, k and v, the residual rows of the level before, (groups of that level, 1 + n, C), in the type of the
    products."""

    def reasons(self) -> list[str]:
        problem = self.problem
        before = problem.layout.seqlens(problem.before)
        reasons = super().reasons() + ["one prefix row only"] * (problem.layout.num_prefix != 1)
        return reasons or (["groups of the level before differ"] if len(set(before.tolist())) > 1 else [])

    def inputs(self, qkv: Tensor) -> list[Tensor]:
        return [*super().inputs(qkv), self._residual(self.problem.before)]

    def outputs(self, grad_out: Tensor) -> list[Tensor]:
        return [*super().outputs(grad_out), self._residual(self.problem.level)]

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        *qkv, residual = inputs
        return [*super().attend(*qkv), regroup(residual, len(self.problem.rows))]

    def _residual(self, level: Level) -> Tensor:
        problem = self.problem
        groups = problem.layout.num_groups(level)
        shape = groups, 1 + problem.layout.num_tokens // groups, problem.heads * problem.head_dim
        return torch.randn(shape, device=problem.device).to(problem.dtype)


class Padded(Peer):
    """(G, H, L of the longest, D)."""

    def scratch(self, backward: bool) -> int:
        problem = self.problem
        elements = len(problem.rows) * int(problem.lengths.max()) * problem.heads * problem.head_dim
        return (12 if backward else 4) * elements * problem.dtype.itemsize

    def prepare(self) -> None:
        lengths = torch.from_numpy(self.problem.lengths).to(self.problem.device)
        columns = torch.arange(int(self.problem.lengths.max()), device=lengths.device)
        self.mask = (columns < lengths[:, None])[:, None, None]

    def put(self, x: Tensor) -> list[Tensor]:
        padded = x.new_zeros(len(self.problem.rows), int(self.problem.lengths.max()), *x.shape[1:])
        padded[self.mask[:, 0, 0]] = x
        return [padded.transpose(1, 2).contiguous()]


class Packed(Peer):
    """All rows in one sequence, group by group: (1, H, R, D)."""

    def put(self, x: Tensor) -> list[Tensor]:
        return [x.transpose(0, 1).contiguous()[None]]

    def groups(self) -> Tensor:
        """(R) int64: the group of each row."""
        lengths = torch.from_numpy(self.problem.lengths).to(self.problem.device)
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(
            lengths, output_size=self.problem.num_rows
        )


class BlockMask(Packed):
    def scratch(self, backward: bool) -> int:
        return self.problem.num_rows**2 * (1 + self.problem.dtype.itemsize)  # a bool, and what is added to scores

    def prepare(self) -> None:
        group = self.groups()
        self.mask = group[:, None] == group


class Flex(Packed):
    """On a CPU the block mask is made without compiling, which would take longer than it saves."""

    compiles = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # of another problem, which would count towards the most recompilations
        self.flex: Any = torch.compile(flex_attention, dynamic=False)
        self.make_mask: Any = create_block_mask if problem.device == "cpu" else torch.compile(create_block_mask)

    def scratch(self, backward: bool) -> int:
        return 2 * self.problem.num_rows**2 if self.problem.device == "cpu" else 0

    def prepare(self) -> None:
        group, rows = self.groups(), self.problem.num_rows
        self.mask = self.make_mask(
            lambda batch, head, i, j: group[i] == group[j], None, None, rows, rows, device=self.problem.device
        )

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        return [self.flex(*inputs, block_mask=self.mask)]


class Jagged(Peer):
    """(R, H, D), group by group."""

    def prepare(self) -> None:
        bounds = np.cumsum([0, *self.problem.lengths])
        self.bounds = torch.from_numpy(bounds).to(self.problem.device, torch.int32)
        self.longest = int(self.problem.lengths.max())


class Nested(Jagged):
    def scratch(self, backward: bool) -> int:
        if self.problem.device != "cpu":
            return 0
        scores = self.problem.heads * int((self.problem.lengths**2).sum()) * max(self.problem.dtype.itemsize, 4)
        return (3 if backward else 2) * scores  # on a CPU it keeps the weights of attention

    def prepare(self) -> None:
        super().prepare()
        self.offsets = self.bounds.long()

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        shortest = int(self.problem.lengths.min())
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x, self.offsets, min_seqlen=shortest, max_seqlen=self.longest
            ).transpose(1, 2)
            for x in inputs
        )
        return [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()]


class Varlen(Jagged):
    backend = "varlen"

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = inputs
        longest, scale = self.longest, self.problem.head_dim**-0.5
        out: Any = varlen_attn(q, k, v, self.bounds, self.bounds, longest, longest, scale=scale)
        return [out]


class FlashAttn(Whole, Jagged):
    backend = "flash"

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        from flash_attn import flash_attn_varlen_qkvpacked_func

        return [flash_attn_varlen_qkvpacked_func(inputs[0], self.bounds, self.longest)]


class FlashAttn3(Jagged):
    backend, module = "flash3", "flash_attn_interface"

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        bounds = {"cu_seqlens_q": self.bounds, "cu_seqlens_k": self.bounds}
        function = importlib.import_module(self.module).flash_attn_varlen_func
        out = function(*inputs, **bounds, max_seqlen_q=self.longest, max_seqlen_k=self.longest)
        return [out[0] if isinstance(out, tuple) else out]  # some releases return the log-sum-exp, too


class FlashAttn4(FlashAttn3):
    backend, module = "flash4", "flash_attn.cute"
    compiles = True


class Xformers(Peer):
    """(1, R, H, D)."""

    backend = "xformers"

    def put(self, x: Tensor) -> list[Tensor]:
        return [x.contiguous()[None]]

    def prepare(self) -> None:
        from xformers.ops.fmha import BlockDiagonalMask

        device = torch.device(self.problem.device)
        self.mask = BlockDiagonalMask.from_seqlens(self.problem.lengths.tolist(), device=device)

    def attend(self, *inputs: Tensor) -> list[Tensor]:
        from xformers.ops import memory_efficient_attention

        out: Any = memory_efficient_attention(*inputs, self.mask, scale=self.problem.head_dim**-0.5)
        return [out]


PEERS: dict[str, Callable[[Problem], Peer]] = {
    **{f"hlip-{backend}": partial(Ours, backend=backend) for backend in BACKENDS},
    "sdpa": PerGroup,
    "sdpa-dense": Dense,
    "sdpa-cudnn": partial(Forced, kernel="CUDNN_ATTENTION"),
    "sdpa-flash": partial(Forced, kernel="FLASH_ATTENTION"),
    "published": Published,
    "padded": Padded,
    "block-mask": BlockMask,
    "flex": Flex,
    "nested": Nested,
    "varlen": Varlen,
    "flash-attn": FlashAttn,
    "flash-attn-3": FlashAttn3,
    "flash-attn-4": FlashAttn4,
    "xformers": Xformers,
}
