"""The contrastive losses: CLIP's, SigLIP's, and CLIP's for two pairs of embeddings at once.

Shapes: B studies of one process, N of all, P pairs of embeddings of a study, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from hlip_kernels import once_differentiable


class Outputs(NamedTuple):
    """What a model makes of a batch of studies and their reports.

    image, text: (B, P, E) of unit length - the pairs to compare. There is one; or, with objective "dual", the
        impressions' and the findings'.
    scale: (P) - each pair's inverse temperature.
    bias: () - SigLIP's; None for CLIP's loss.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None = None


def contrastive_loss(outputs: Outputs, local_loss: bool = False, counts: Sequence[int] | None = None) -> Tensor:
    """The loss over the studies of all processes, averaged over the pairs, in float32 or more.

    Under DistributedDataParallel, which averages over the processes, the gradient is that of one process with all
    studies, in both ways of sharing out the work:

    Args:
        local_loss: each process compares its own studies with all, (B, N) logits, and returns its part, whose mean over
            the processes is the loss; else every process compares all with all and returns the loss.
        counts: studies of each process; all have as many as this one if None.

    Source: CLIP (arXiv 2103.00020), figure 3; SigLIP (arXiv 2303.15343), algorithm 1.
    """
    image, text = at_least_float32(outputs.image), at_least_float32(outputs.text)
    all_image, all_text, first, parts = image, text, 0, 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        rank, world = dist.get_rank(), dist.get_world_size()
        counts = list(counts) if counts is not None else [len(image)] * world
        all_image, all_text = (_AllGather.apply(rows, counts, local_loss) for rows in (image, text))
        if local_loss:
            first, parts = sum(counts[:rank]), world
        else:
            image, text = all_image, all_text
    scale = outputs.scale[:, None, None]
    by_image = scale * image.transpose(0, 1) @ all_text.permute(1, 2, 0)  # (P, B or N, N)
    labels = torch.arange(len(image), device=image.device) + first
    if outputs.bias is not None:
        sign = 2 * F.one_hot(labels, len(all_text)) - 1
        total = -F.logsigmoid(sign * (by_image + outputs.bias)).sum()
    else:
        by_text = scale * text.transpose(0, 1) @ all_image.permute(1, 2, 0) if parts > 1 else by_image.mT
        both = torch.cat([by_image, by_text]).flatten(0, 1)
        total = F.cross_entropy(both, labels.repeat(2 * len(scale)), reduction="sum") / 2
    return total * parts / (len(all_text) * len(scale))


def at_least_float32(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


class _AllGather(torch.autograd.Function):
    """Rows of all processes, in order of rank. The gradient makes up for DistributedDataParallel's averaging.

    Where every process computes the same of all rows, its own rows' gradient is whole on it, and is multiplied by the
    number of processes. Where they compute parts, gradients of its rows arise on all processes, and are added.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int], parts: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.counts, ctx.parts = counts, parts
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([each[:count] for each, count in zip(gathered, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, saved: tuple[()], grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        if ctx.parts:
            grad = grad.contiguous()
            dist.all_reduce(grad)
        own = grad.split(ctx.counts)[dist.get_rank()]
        return own if ctx.parts else own * len(ctx.counts), None, None
