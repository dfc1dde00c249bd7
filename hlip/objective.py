"""The objectives of training, one class for each.

Shapes: B studies of one process, N of all, P pairs of embeddings of a study, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from hlip_kernels import once_differentiable

from .read.texts import split_items, split_sentences
from .study import join_report


class Outputs(NamedTuple):
    """The embeddings of a batch of studies and of their texts.

    image, text: (B, P, E) of unit length - the pairs to compare.
    scale: (P) - each pair's inverse temperature.
    bias: () - SigLIP's; None for CLIP's loss.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None = None


TextsName = Literal["report", "shuffled", "sentence", "item", "items"]


@dataclass(frozen=True)
class Wording:
    """Wording of a study's text in training.

    texts, findings: what of a report the first side and the second side read; see `TrainConfig`.
    sentence_dropout: share of sentences or items that is left out.
    prefix: in front of every text.
    findings_prefix: in front of those of the second side; `prefix` if None.
    """

    texts: TextsName = "report"
    sentence_dropout: float = 0.0
    findings: Literal["findings", "report"] = "findings"
    prefix: str = ""
    findings_prefix: str | None = None

    @property
    def fixed(self) -> bool:
        """True if a study has the same text at every step."""
        return self.texts == "report" and self.sentence_dropout == 0 and self.findings == "findings"

    def split(self, text: str) -> list[str]:
        """The pieces of a text: its sentences, or its items."""
        return split_items(text) if self.texts in ("item", "items") else split_sentences(text)


WHOLE = Wording()

# By the name that files of models have for them; a class enters itself.
OBJECTIVES: dict[str, Clip] = {}


class Clip:
    """A study is compared with its report, by the loss of CLIP. Other objectives say what differs.

    begin: what the model's parameters of the objective begin with, by their keys in its state; `logit_scale` is one.
    temperatures: those of them that are logarithms of inverse temperatures, one for each pair of embeddings.
    bias: the one of them that is added to logits.
    sides: a name for the texts of each pair.

    Source: CLIP (arXiv 2103.00020), figure 3.
    """

    begin: ClassVar[dict[str, float]] = {"logit_scale": math.log(1 / 0.07)}
    temperatures: ClassVar[tuple[str, ...]] = ("logit_scale",)
    bias: ClassVar[str | None] = None
    sides: ClassVar[tuple[str, ...]] = ("reports",)

    def __init_subclass__(cls) -> None:
        OBJECTIVES[cls.__name__.lower()] = cls()

    @property
    def late(self) -> tuple[str, ...]:
        """The parameters that a released model's file may lack."""
        return tuple(name for name in self.begin if name not in Clip.begin)

    @property
    def pairs(self) -> int:
        """P: the first embeddings of a study, each of which is compared with a text of its own."""
        return len(self.sides)

    def texts(self, impressions: Sequence[str], findings: Sequence[str], wording: Wording = WHOLE) -> list[str]:
        """The texts that N studies are compared with: N for the first pair, N for the next."""
        sections = zip(impressions, findings, strict=True)
        return [wording.prefix + join_report(*study) for study in sections]

    def pieces(
        self, impression: str, findings: str, wording: Wording, random: np.random.Generator
    ) -> tuple[list[str], str]:
        """The pieces of a report of which training draws, and the findings beside them."""
        return wording.split(impression) + wording.split(findings), ""

    def draw_text(self, report: tuple[str, str], wording: Wording, random: np.random.Generator) -> tuple[str, str]:
        """An impression and findings as a step of training reads them."""
        pieces, findings = ([], "") if wording.fixed else self.pieces(*report, wording, random)
        if not pieces:
            return report
        keep = random.random(len(pieces)) >= wording.sentence_dropout
        keep[random.integers(len(pieces))] = True
        pieces = [piece for piece, kept in zip(pieces, keep, strict=True) if kept]
        if wording.texts in ("shuffled", "items"):
            random.shuffle(pieces)
        elif wording.texts in ("sentence", "item"):
            pieces = [pieces[int(random.integers(len(pieces)))]]
        return " ".join(pieces), findings

    def outputs(self, model: nn.Module, image: Tensor, text: Tensor) -> Outputs:
        """The pairs to compare, of the embeddings of B studies, (B, P, E), and of their P * B texts, (P * B, E)."""
        text = text.unflatten(0, (self.pairs, len(image))).transpose(0, 1)
        scale = torch.stack([getattr(model, name) for name in self.temperatures]).exp()
        return Outputs(image, text, scale, getattr(model, self.bias).clone() if self.bias else None)

    @torch.no_grad()
    def clamp(self, model: nn.Module) -> None:
        """Keep temperatures from 0.01 to 1, as CLIP does."""
        for name in self.temperatures:
            getattr(model, name).clamp_(0, math.log(100))

    def loss(self, outputs: Outputs, local_loss: bool = False, counts: Sequence[int] | None = None) -> Tensor:
        """The loss over the studies of all processes, averaged over the pairs, in float32 or more.

        Under DistributedDataParallel, which averages over the processes, the gradient is that of one process with all
        studies, in both ways of sharing out the work:

        Args:
            local_loss: each process compares its own studies with all, (B, N) logits, and returns its part, whose mean
                over the processes is the loss; else every process compares all with all and returns the loss.
            counts: studies of each process; all have as many as this one if None.
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
        by_text = scale * text.transpose(0, 1) @ all_image.permute(1, 2, 0) if parts > 1 else by_image.mT
        labels = torch.arange(len(image), device=image.device) + first
        return self.total(by_image, by_text, labels, outputs.bias) * parts / (len(all_text) * len(scale))

    def total(self, by_image: Tensor, by_text: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        """The sum of the losses of all rows: (P, B, N) logits of studies with texts, and of texts with studies, of
        which each row's own is in column `labels` (B)."""
        both = torch.cat([by_image, by_text]).flatten(0, 1)
        return F.cross_entropy(both, labels.repeat(2 * len(by_image)), reduction="sum") / 2


OBJECTIVES["clip"] = Clip()


class SigLip(Clip):
    """A study is compared with its report, and every pair of them is told apart for itself.

    Source: SigLIP (arXiv 2303.15343), algorithm 1.
    """

    begin: ClassVar = {"logit_scale": math.log(10), "logit_bias": -10.0}
    bias: ClassVar = "logit_bias"

    def total(self, by_image: Tensor, by_text: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        sign = 2 * F.one_hot(labels, by_image.shape[-1]) - 1
        return -F.logsigmoid(sign * (by_image + bias)).sum()


class Dual(Clip):
    """A study's first embedding is compared with its impression, the second with its findings, each at a temperature of
    its own. Either section stands in for the other if that is empty. Training varies the impression alone; an absent
    one is drawn of the findings' sentences. With the findings "report", the whole report stands for both sections, and
    the second text is all of its pieces in random order.

    Source: HLIP's released models of October 2025. Their key `logit_bias` holds the findings' temperature.
    """

    begin: ClassVar = {"logit_scale": math.log(1 / 0.07), "logit_bias": math.log(1 / 0.07)}
    temperatures: ClassVar = ("logit_scale", "logit_bias")
    sides: ClassVar = ("impressions", "findings")

    def texts(self, impressions: Sequence[str], findings: Sequence[str], wording: Wording = WHOLE) -> list[str]:
        pairs = list(zip(impressions, findings, strict=True))
        prefix = wording.prefix if wording.findings_prefix is None else wording.findings_prefix
        return [wording.prefix + (first or second) for first, second in pairs] + [
            prefix + (second or first) for first, second in pairs
        ]

    def pieces(
        self, impression: str, findings: str, wording: Wording, random: np.random.Generator
    ) -> tuple[list[str], str]:
        if wording.findings == "report":
            pieces, _ = super().pieces(impression, findings, wording, random)
            return pieces, " ".join(pieces[i] for i in random.permutation(len(pieces)))
        return wording.split(impression) or wording.split(findings), findings


if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]


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
        return torch.cat([padded[:count] for padded, count in zip(gathered, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, saved: tuple[()], grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        if ctx.parts:
            grad = grad.contiguous()
            dist.all_reduce(grad)
        own = grad.split(ctx.counts)[dist.get_rank()]
        return own if ctx.parts else own * len(ctx.counts), None, None
