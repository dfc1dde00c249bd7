"""Which patches of a study speak for a text: attention times its gradient, carried back through layers and levels.

A layer's relevance matrix is the mean over the heads of max(A * dA, 0): its attention A, and the gradient dA of the
text's logit with respect to A. With identity added, it says what every row owes to every row before the layer; between
layers of different levels stands the matrix that averages or clones prefix rows. Of the product of all these, one row
is wanted, that of the study's prefix token. So the row alone is carried back, from the last layer to the first, and
every matrix is made a few rows at a time: memory grows with the number of tokens, not with its square.

Shapes: R = G * P + T rows of a level: G groups, P prefix rows a group, T patch tokens; H heads, D head dim;
M scans of the study; E embedding.

Source: Chefer et al. 2021 (arXiv 2103.15679), self-attention; HLIP (arXiv 2505.21862), figure 6, for the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hlip_kernels import Level, StudyLayout, regroup, rotate

from ..embed.texts import embed_prompts
from ..model.clip import HLIPModel
from ..model.encoder import Block, Stream
from ..objective import at_least_float32
from ..study import PackedBatch, Study, pack

Layers = Literal["last", "all"]
Progress = Callable[[Sequence[int]], Iterable[int]]
TILE = 2**22  # numbers of a layer's attention that are in memory at a time, of a few such matrices: 16 MiB each
TILE_ROWS = 256  # of one head, before several heads go into a tile


@dataclass(frozen=True)
class Relevance:
    """How much every patch of a study speaks for a text.

    names: of the scans.
    maps: for each scan (d, h, w) float32 on the host, its token grid; 0 or more, without a unit.
    similarity: cosine of the study's embedding and the text's.
    """

    uid: str
    names: list[str]
    maps: list[Tensor]
    similarity: float

    @property
    def shares(self) -> np.ndarray:
        """(M) float64: each scan's part of all relevance; all 0 if there is none."""
        sums = np.array([float(values.double().sum()) for values in self.maps])
        return sums / sums.sum() if sums.any() else sums


def relevance(
    model: HLIPModel,
    study: Study,
    target: str | Tensor,
    layers: Layers = "all",
    against: str | Tensor | None = None,
    normalize: bool = False,
    progress: Progress = iter,
) -> Relevance:
    """The relevance of a study's patches to its likeness to a text.

    The logit that is differentiated is the cosine of both embeddings times `exp(logit_scale)`. Where the model gives
    several embeddings of a study it is that of head 0, and the prefix token the one that makes head 0: cls, not the
    register. With head "dinotxt" gradients come through the mean of the patch rows too, but what is carried back is the
    prefix token's row alone. Each block is run again for its gradients: only the streams between blocks are kept.

    Args:
        target: a text; or an (E) embedding, such as a row of `zeroshot_classifier`.
        layers: "all"; or "last", what the last layer's prefix row attends to directly, as published.
        against: a text or embedding whose logit is subtracted: what sets the target apart from it. Texts on one kind
            of image are much alike, and by itself the target's logit also speaks for what they have in common.

    Raises:
        ValueError: a model without a prefix token that makes its embedding, a text that is too long, an embedding of
            another size, or what `pack` refuses.
    """
    config = model.config.vision
    if layers not in get_args(Layers):
        raise ValueError(f"layers must be {' or '.join(get_args(Layers))}, got {layers!r}")
    if config.head not in ("token", "dinotxt"):
        raise ValueError(
            f"relevance is that of a study's prefix token, and head {config.head!r} makes the embedding without one"
        )
    texts = torch.stack([_embedding(model, text) for text in (target, against) if text is not None])
    batch = pack([study], config.patch_size)
    with _frozen(model.visual), torch.autocast(model.device.type, enabled=False):
        row, similarity = _carried_back(model, batch, texts, layers, normalize, progress)
    grids = batch.layout.grids[0]
    maps = row.float().cpu().split([d * h * w for d, h, w in grids])
    names = [study.names[m] if m < len(study.names) else f"scan {m}" for m in range(len(grids))]
    return Relevance(
        study.uid, names, [values.view(grid) for values, grid in zip(maps, grids, strict=True)], similarity
    )


@torch.no_grad()
def _embedding(model: HLIPModel, text: str | Tensor) -> Tensor:
    """(E), of unit length, on the model's device."""
    if isinstance(text, str):
        return embed_prompts(model, [[text]])[0]
    shape = tuple(text.shape) if isinstance(text, Tensor) else repr(text)
    if shape != (model.config.embed_dim,):
        raise ValueError(f"expected a text, or its embedding of ({model.config.embed_dim}), got {shape}")
    return F.normalize(text.to(model.device), dim=0)


def _carried_back(
    model: HLIPModel, batch: PackedBatch, texts: Tensor, layers: Layers, normalize: bool, progress: Progress
) -> tuple[Tensor, float]:
    """(T) relevance of the patches, and the cosine with the first of (1 or 2, E) texts; the second is against it."""
    trunk, config = model.visual.trunk, model.config.vision
    tokens = trunk.plan(batch).to(model.device)
    layout, levels, last, rotary = tokens.layout, config.levels, len(config.levels) - 1, trunk.rotary(tokens)
    first = last if layers == "last" else 0
    streams: list[Stream] = []
    with torch.no_grad():
        stream, previous = trunk.embed(tokens), levels[0]
        for i, (block, level) in enumerate(zip(trunk.blocks, levels, strict=True)):
            if i >= first:
                streams.append(stream)
            stream, previous = block(stream, layout, previous, level, rotary.get(level)), level
    stream = _leaves(stream)
    assert stream.update is not None
    with torch.enable_grad():
        image = F.normalize(at_least_float32(model.visual.head(trunk.outputs(stream, layout)[0, 0])), dim=0)
        similarities = texts.to(image.dtype) @ image
        logit = model.logit_scale.detach().exp() * (similarities[0] - similarities[1:].sum())
        grads = torch.autograd.grad(logit, [stream.x, stream.update])

    row = torch.zeros(layout.num_rows("study"), dtype=image.dtype, device=model.device)
    row[0] = 1
    above: Level = "study"
    for i in progress(range(last, first - 1, -1)):
        block, level = trunk.blocks[i], levels[i]
        assert isinstance(block, Block)
        turns = rotary.get(level)
        below = levels[max(0, i - 1)]
        qkv, grad_out, grads = _gradients(block, _leaves(streams.pop()), layout, below, level, turns, grads)
        row = move_back(row, layout, level, above)
        row, above = row + times_matrix(row, qkv, grad_out, layout, level, normalize), level
    return row[layout.patch_rows(above)], float(similarities[0].detach())


def _leaves(stream: Stream) -> Stream:
    x, update, _ = stream
    return Stream(x.detach().requires_grad_(), None if update is None else update.detach().requires_grad_(), None)


def _gradients(
    block: Block,
    stream: Stream,
    layout: StudyLayout,
    previous: Level,
    level: Level,
    rotary: Tensor | None,
    grads: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Run a block forward and backward: (R, 3, H, D) of its attention, the gradient of attention's (R, H, D) output,
    and the gradients of the stream it was given.

    Args:
        grads: of the stream that it returns.
    """
    seen: dict[str, Tensor] = {}
    attention = block.attn
    hooks = [
        attention.qkv.register_forward_hook(lambda module, args, out: seen.update(qkv=out)),
        attention.proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0])),
    ]
    try:
        with torch.enable_grad():
            result = block(stream, layout, previous, level, rotary)
    finally:
        for hook in hooks:
            hook.remove()
    given = [tensor for tensor in stream[:2] if tensor is not None]
    grad_out, *below = torch.autograd.grad(result[:2], [seen["out"], *given], grads)
    qkv = seen["qkv"].detach().unflatten(-1, (3, attention.num_heads, -1))
    qkv = qkv if rotary is None else rotate(qkv, rotary)
    return qkv, grad_out.unflatten(-1, (attention.num_heads, -1)), tuple(below)


def times_matrix(
    row: Tensor, qkv: Tensor, grad_out: Tensor, layout: StudyLayout, level: Level, normalize: bool = False
) -> Tensor:
    """`row` times a layer's relevance matrix, the mean over the heads of max(A * dA, 0): (R) to (R).

    A = softmax(q k^T / sqrt(D)) within the groups of `level`, and dA = grad_out v^T is the gradient with respect to it.

    Args:
        row: (R) - rows of the matrix where it is 0 are not made.
        qkv: (R, 3, H, D)
        grad_out: (R, H, D) - the gradient with respect to attention's output.
        normalize: divide every row of the matrix by its sum; rows of zeros stay.
    """
    qkv, grad_out = at_least_float32(qkv), at_least_float32(grad_out)
    _, _, num_heads, head_dim = qkv.shape
    result = torch.zeros_like(row)
    for start, end in pairwise(layout.cu_seqlens(level).tolist()):
        rows, length = slice(start, end), end - start
        active = start + row[rows].nonzero()[:, 0]
        if not len(active):
            continue
        heads_at_once = min(num_heads, max(1, TILE // (TILE_ROWS * length)))
        rows_at_once = max(1, TILE // (heads_at_once * length))
        k, v = (qkv[rows, i].permute(1, 2, 0) for i in (1, 2))
        for some in active.split(rows_at_once):
            matrix = row.new_zeros(len(some), length)
            for first in range(0, num_heads, heads_at_once):
                heads = slice(first, first + heads_at_once)
                q, g = (x[some].transpose(0, 1) for x in (qkv[:, 0, heads], grad_out[:, heads]))
                attention = (q * head_dim**-0.5 @ k[heads]).softmax(-1)
                matrix += attention.mul_(g @ v[heads]).clamp_(min=0).sum(0)
            sums = matrix.sum(1) if normalize else torch.full_like(row[some], num_heads)
            result[rows] += (row[some] / sums.where(sums > 0, 1)) @ matrix
    return result


def move_back(row: Tensor, layout: StudyLayout, below: Level, above: Level) -> Tensor:
    """`row` times the matrix that makes the rows of level `above` of those of `below`: (R above) to (R below).

    A prefix row that is the mean of n shares its relevance out, a n-th to each; one that was cloned gets the sum.
    """
    if below == above:
        return row
    with torch.enable_grad():
        rows = row.new_zeros(layout.num_rows(below), 1, requires_grad=True)
        (moved,) = torch.autograd.grad(regroup(rows, layout, below, above), rows, row[:, None])
    return moved[:, 0]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, and without gradients of parameters."""
    training = module.training
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        module.train(training)
        for parameter in wanted:
            parameter.requires_grad_()
