"""The contrastive losses: CLIP's, SigLIP's, and CLIP's for two pairs of embeddings at once.

Shapes: B studies of one process, N of all, P pairs of embeddings of a study, E embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


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


def contrastive_loss(outputs: Outputs, local_loss: bool = False) -> Tensor:
    """The loss over the studies of all processes, averaged over the pairs. B is the same on every process.

    Under DistributedDataParallel, which averages over the processes, the gradient is that of one process with all
    studies, in both ways of sharing out the work:

    Args:
        local_loss: each process compares its own studies with all, (B, N) logits, and returns its part, whose mean over
            the processes is the loss; else every process compares all with all and returns the loss.

    Source: CLIP (arXiv 2103.00020), figure 3; SigLIP (arXiv 2303.15343), algorithm 1.
    """
    image = all_image = outputs.image.float() if outputs.image.dtype.itemsize < 4 else outputs.image
    text = all_text = outputs.text.to(image.dtype)
    first = 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        all_image, all_text = _AllGather.apply(image, local_loss), _AllGather.apply(text, local_loss)
        if local_loss:
            first = len(image) * dist.get_rank()
        else:
            image, text = all_image, all_text
    scale = outputs.scale[:, None, None]
    by_image = scale * image.transpose(0, 1) @ all_text.permute(1, 2, 0)  # (P, B or N, N)
    labels = torch.arange(len(image), device=image.device) + first
    if outputs.bias is not None:
        sign = 2 * F.one_hot(labels, len(all_text)) - 1
        return -F.logsigmoid(sign * (by_image + outputs.bias)).sum(-1).mean()
    by_text = scale * text.transpose(0, 1) @ all_image.permute(1, 2, 0) if local_loss else by_image.mT
    labels = labels.expand(len(scale), -1).flatten()
    return (F.cross_entropy(by_image.flatten(0, 1), labels) + F.cross_entropy(by_text.flatten(0, 1), labels)) / 2


class _AllGather(torch.autograd.Function):
    """Rows of all processes, in order of rank. The gradient makes up for DistributedDataParallel's averaging.

    Where every process computes the same of all rows, its own rows' gradient is whole on it, and is multiplied by the
    number of processes. Where they compute parts, gradients of its rows arise on all processes, and are added.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, parts: bool) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.parts = parts
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        if ctx.parts:
            grad = grad.contiguous()
            dist.all_reduce(grad)
        own = grad.chunk(dist.get_world_size())[dist.get_rank()]
        return own if ctx.parts else own * dist.get_world_size(), None
