"""One optimizer step's gradient, in as many pieces as memory asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hlip.model.losses import Outputs, contrastive_loss
from hlip.model.plan import TokenBatch


@dataclass
class MicroBatch:
    """What the model reads at once.

    texts: of its studies, as `ModelConfig.texts` gives them; or their features.
    uids: one per study.
    seed: of what is drawn in forward.
    """

    tokens: TokenBatch
    texts: list[str] | Tensor
    uids: list[str]
    seed: int

    def to(self, device: torch.device) -> MicroBatch:
        texts = self.texts.to(device, non_blocking=True) if isinstance(self.texts, Tensor) else self.texts
        return replace(self, tokens=self.tokens.to(device), texts=texts)


def backward(
    model: nn.Module,
    pieces: Sequence[MicroBatch],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    local_loss: bool = False,
    counts: Sequence[int] | None = None,
    loss_scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Tensor, Outputs]:
    """Add the gradient of the loss over all pieces of all processes to the model's parameters.

    In several pieces, their embeddings are computed first, without a graph; the loss of all gives the embeddings'
    gradients, with which each piece is run again, forward and backward. That is the gradient of one piece, at
    the price of a second forward; no more than one piece's activations exist at a time.

    Args:
        model: an `HLIPModel`, or one wrapped by DDP or FSDP.
        autocast: context in which the model runs.
        local_loss, counts: see `contrastive_loss`.
        loss_scale: of fp16, by which gradients are multiplied.

    Returns:
        The loss, and the outputs of all pieces, both detached.

    Source: gradient caching (arXiv 2101.06983).
    """

    def forward(piece: MicroBatch) -> Outputs:
        torch.manual_seed(piece.seed)
        with autocast():
            return model(piece.tokens, piece.texts)

    if len(pieces) == 1:
        outputs = forward(pieces[0].to(device))
        loss = contrastive_loss(outputs, local_loss, counts)
        loss_scale(loss).backward()
        return loss.detach(), detach(outputs)

    with torch.no_grad():
        parts = [forward(piece.to(device)) for piece in pieces]
    sizes = [len(part.image) for part in parts]
    image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
    whole = Outputs(image, text, parts[0].scale, parts[0].bias)
    leaves = Outputs(*(each if each is None else each.detach().requires_grad_() for each in whole))
    loss = contrastive_loss(leaves, local_loss, counts)
    loss_scale(loss).backward()
    assert leaves.image.grad is not None and leaves.text.grad is not None
    grads = zip(leaves.image.grad.split(sizes), leaves.text.grad.split(sizes), strict=True)
    for i, (piece, (image_grad, text_grad)) in enumerate(zip(pieces, grads, strict=True)):
        last = i == len(pieces) - 1
        with synchronised(model, last):
            outputs = forward(piece.to(device))
            roots = [(outputs.image, image_grad), (outputs.text, text_grad)]
            if last:  # temperature and bias belong to all pieces
                roots += [(outputs.scale, leaves.scale.grad)]
                roots += [] if leaves.bias is None else [(outputs.bias, leaves.bias.grad)]
            roots = [(root, grad) for root, grad in roots if root.requires_grad]
            torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
    return loss.detach(), detach(whole)


def detach(outputs: Outputs) -> Outputs:
    return Outputs(*(each if each is None else each.detach() for each in outputs))


@contextlib.contextmanager
def synchronised(model: Any, last: bool) -> Iterator[None]:
    """Gradients are reduced over the processes with the last piece only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield
