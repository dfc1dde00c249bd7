"""Retrieval: from a study to its report and back, and to studies like it.

Shapes: N studies with a report, P pairs of embeddings of a study and its report, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..embed.baselines import SliceEncoder
from ..embed.table import Embeddings
from ..embed.texts import Progress, embed_texts
from ..model.clip import HLIPModel
from ..objective import Clip
from ..output import new_figure
from ..store.store import Store

DIRECTIONS = ("image to report", "report to image")
KS = (1, 5, 10, 50, 100)
BLOCK = 2**24  # similarities at a time: 64 MiB


@dataclass(frozen=True)
class Pairs:
    """Studies and their reports, embedded.

    image, text: (P, N, E) float32 of unit length.
    texts: of each pair, the N texts: reports; or impressions and findings, of a model that compares these apart.
    without_report, without_embedding: studies of the store that are left out.
    not_in_store: studies that have an embedding only.
    """

    uids: list[str]
    image: Tensor
    text: Tensor
    texts: list[list[str]]
    without_report: list[str]
    without_embedding: list[str]
    not_in_store: list[str]

    @classmethod
    def embed(
        cls,
        model: HLIPModel | SliceEncoder,
        store: Store,
        embeddings: Embeddings,
        batch: int = 64,
        progress: Progress = iter,
    ) -> Pairs:
        """Embed the reports of a store's studies, each text once, and put them beside the embeddings of the studies.

        A model with two embeddings of a study has its first compared with impressions and its second with findings,
        where either stands in for the other if that is empty; any other model has its first compared with reports.

        Args:
            embeddings: of whole studies, of the same model.
            batch: texts at a time.
            progress: wraps the batches, for a bar.

        Raises:
            ValueError: no study with a report and embeddings, embeddings of too few heads, or of another width.
        """
        reports = reports_of(store)
        objective = model.objective if isinstance(model, HLIPModel) else Clip()
        pairs = objective.pairs
        tables = [dict(zip(*embeddings.of_studies(head), strict=True)) for head in range(pairs)]
        embedded = [uid for uid in store.uids.tolist() if all(uid in table for table in tables)]
        uids = [uid for uid in embedded if uid in reports]
        if not uids:
            raise ValueError(f"{store.path}: none of the {len(embedded)} studies with embeddings has a report")
        impressions, findings = map(list, zip(*(reports[uid] for uid in uids), strict=True))
        joined = objective.texts(impressions, findings)
        texts = [joined[p * len(uids) : (p + 1) * len(uids)] for p in range(pairs)]
        image = torch.from_numpy(np.stack([[table[uid] for uid in uids] for table in tables]))
        text = embed_texts(model, [one for column in texts for one in column], batch, progress)
        if text.shape[1] != image.shape[2]:
            raise ValueError(f"the embeddings are of width {image.shape[2]}, the model's of {text.shape[1]}")
        without_report = [uid for uid in embedded if uid not in reports]
        without_embedding = sorted(set(store.uids.tolist()) - set(embedded))
        not_in_store = sorted(set(tables[0]) - set(store.uids.tolist()))
        text = text.unflatten(0, (pairs, len(uids)))
        return cls(uids, image, text, texts, without_report, without_embedding, not_in_store)


def reports_of(store: Store) -> dict[str, tuple[str, str]]:
    """Impression and findings of every study that has either, by uid."""
    columns = [store.manifest.column(name).to_pylist() for name in ("impression", "findings")]
    return {
        uid: (impression, findings)
        for uid, impression, findings in zip(store.uids.tolist(), *columns, strict=True)
        if impression.strip() or findings.strip()
    }


def match_ranks(queries: Tensor, gallery: Tensor, groups: np.ndarray, progress: Progress = iter) -> np.ndarray:
    """The rank, from 1, at which each query first meets a match: (N, E) and (N, E) to (N) int64.

    A query's matches are its own row of the gallery and all rows of its group. Of rows that are as similar as the best
    match, those that do not match count as before it. Similarities are made a block at a time, never (N, N).

    Args:
        groups: (N) - equal for studies whose reports are the same.
    """
    n = len(queries)
    rows = max(1, BLOCK // n)
    group = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    ranks = []
    for start in progress(range(0, n, rows)):
        similarity = queries[start : start + rows] @ gallery.T
        match = group[start : start + rows, None] == group
        best = similarity.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best) & ~match).sum(1) + 1)
    return torch.cat(ranks).numpy()


def recall(ranks: np.ndarray, groups: np.ndarray, ks: Sequence[int] = KS) -> dict[str, Any]:
    """Figures of a direction.

    Returns:
        `recall`: by k, the share of queries with a match among the first k; at the gallery's size and above it says
        nothing and is left out. `chance`: the same, expected of a random order. `median_rank`.
    """
    n = len(ranks)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    matches = sizes[group]
    kept = [k for k in sorted(set(ks)) if k < n]
    return {
        "recall": {k: float((ranks <= k).mean()) for k in kept},
        "chance": {k: float(1 - _none_of(matches, n, k).mean()) for k in kept},
        "median_rank": float(np.median(ranks)),
    }


def _none_of(matches: np.ndarray, n: int, k: int) -> np.ndarray:
    """The probability that k of n rows, drawn without replacement, hold none of so many matches."""
    distinct, place = np.unique(matches, return_inverse=True)
    # (n - m choose k) / (n choose k), as a product over the drawn rows.
    return np.array([np.prod(np.clip((n - m - np.arange(k)) / (n - np.arange(k)), 0, None)) for m in distinct])[place]


def retrieve(pairs: Pairs, ks: Sequence[int] = KS, progress: Progress = iter) -> list[dict[str, Any]]:
    """Recall at k and median rank, of every pair in both directions, and `ranks` (N).

    Studies whose texts are the same to the letter, but for space at the ends, are matches of each other: no model can
    tell which of their reports is whose.
    """
    directions = []
    for p, texts in enumerate(pairs.texts):
        groups = np.array([text.strip() for text in texts])
        for direction, sides in zip(DIRECTIONS, ((pairs.image, pairs.text), (pairs.text, pairs.image)), strict=True):
            ranks = match_ranks(sides[0][p], sides[1][p], groups, progress)
            figures = {"direction": direction, "head": p, "studies": len(ranks), "texts": len(set(groups.tolist()))}
            directions.append({**figures, **recall(ranks, groups, ks), "ranks": ranks})
    return directions


def nearest(query: Tensor, gallery: Tensor, k: int, leave: int | None = None) -> list[tuple[int, float]]:
    """The k rows of a gallery that are most similar to a query, and their similarities: (E) and (N, E).

    Args:
        leave: a row that does not count, as that of the query itself.
    """
    similarity = gallery @ F.normalize(query, dim=0)
    if leave is not None:
        similarity[leave] = -torch.inf
    count = min(k, len(gallery) - (leave is not None))
    order = torch.argsort(similarity, descending=True, stable=True)[:count].tolist()
    return [(i, float(similarity[i])) for i in order]


def draw_recall(figures: Sequence[dict[str, Any]], file: IO[bytes], kind: str) -> None:
    """Draw recall against k, a line for every pair and direction, and what a random order would have.

    Args:
        figures: what `retrieve` gives.
        kind: "png", "pdf" or "svg".
    """
    chart = new_figure(6, 4.4)
    axes = chart.add_subplot()
    several = len(figures) > len(DIRECTIONS)
    for i, figure in enumerate(figures):
        n = figure["studies"]
        curve = np.searchsorted(np.sort(figure["ranks"]), np.arange(1, n + 1), side="right") / n
        name = figure["direction"] + (f", head {figure['head']}" if several else "")
        axes.step(
            np.arange(1, n + 1), curve, where="post", color=f"C{i}", label=f"{name} (median {figure['median_rank']:g})"
        )
    chance = figures[0]["chance"]
    axes.plot(list(chance), list(chance.values()), "k--", linewidth=0.9, label="random order")
    axes.set(xscale="log", xlabel="k", ylabel="recall at k", ylim=(0, 1.02), title=f"{figures[0]['studies']} studies")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    chart.savefig(file, format=kind, dpi=120)
