"""Zero-shot classification: what studies show, by the likeness of their embeddings to those of a task's prompts; and
its evaluation, a task's figures with intervals.

Shapes: N studies, or scans where these are scored; K classes, T prompts (see `tasks`), E embedding, D draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..embed.inputs import Studies
from ..embed.loop import Options, embed
from ..embed.table import Embeddings
from ..embed.texts import TextEncoder, embed_prompts
from ..model.clip import HLIPModel
from ..study import Study
from . import metrics
from .labels import MISSING, SHOWN, check_join
from .tasks import Task


@dataclass(frozen=True)
class Part:
    """Classes that are scored together: all of a task, or those of a subtask.

    prefix: of result keys.
    names: (k).
    labels, scores: (N, k).
    cuts: (k) - a score above is positive.
    """

    prefix: str
    names: Sequence[str]
    labels: np.ndarray
    scores: np.ndarray
    cuts: np.ndarray


def zeroshot_classifier(model: TextEncoder, task: Task, templates: str | None = None) -> Tensor:
    """(T, E): for every prompt the normalised mean over the embeddings of its wordings in all templates.

    Raises:
        ValueError: no such templates, or a prompt that is too long for the text tower.
    """
    return embed_prompts(model, task.prompts(templates))


def zeroshot(
    model: HLIPModel, studies: Studies | Iterable[Study], task: Task, templates: str | None = None
) -> tuple[list[str], np.ndarray]:
    """What a task says of every study: uids, and (N, K) float64. See `Task.scores`.

    Raises:
        ValueError: no study, or one whose embedding is not finite.
    """
    uids, similarities = compare(model, studies, zeroshot_classifier(model, task, templates))
    return uids, task.scores(similarities, scale_of(model))


def compare(model: HLIPModel, studies: Studies | Iterable[Study], texts: Tensor) -> tuple[list[str], np.ndarray]:
    """The cosines of studies with the (T, E) embeddings of texts: uids, and (N, T) float64.

    Raises:
        ValueError: as `zeroshot`.
    """
    made = embed(model, studies, Options(dtype="fp32"))
    assert made is not None
    for uid, reason in made.facts["failed"]:
        raise ValueError(f"{uid}: {reason}")
    if not len(made):
        raise ValueError("there is no study to classify")
    first = made.head == 0  # which is for zero-shot classification
    return made.study[first].tolist(), similarities_of(made.embedding[first], texts)


def similarities_of(embeddings: np.ndarray, texts: Tensor) -> np.ndarray:
    """(N, E) and (T, E) to (N, T) float64: cosines.

    Raises:
        ValueError: embeddings of different widths.
    """
    if texts.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"the embeddings have {embeddings.shape[1]} numbers, the model's text tower gives {texts.shape[1]}"
        )
    return embeddings.astype(np.float64) @ texts.double().cpu().numpy().T


def scale_of(model: TextEncoder) -> float:
    """The inverse temperature of a model."""
    return float(model.logit_scale.detach().exp())


@dataclass(frozen=True)
class Evaluation:
    """What a task found.

    uids: (N).
    scans: (N) names of scans, where each is scored by itself; none if the task scores whole studies.
    labels: (N, K) of 0, 1 and -1.
    scores: (N, K) - shares among the prompts that are compared; of kind "similarity" the cosine to the prompt.
    metrics: result keys to values; not-a-number where labels allow none.
    intervals: of the same keys, 95% by drawing studies; None where no draw has a value.
    thresholds: of the classes, where figures need one.
    notes: what was left out, in words.
    """

    task: Task
    uids: list[str]
    labels: np.ndarray
    scores: np.ndarray
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float] | None]
    thresholds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scans: list[str] = field(default_factory=list)


def evaluate(
    task: Task,
    embeddings: Embeddings,
    labels: Mapping[str, np.ndarray],
    model: TextEncoder,
    templates: str | None = None,
    allow_unmatched: bool = False,
    draws: int = metrics.DRAWS,
    seed: int = 0,
    head: int | None = None,
    compared: bool = False,
) -> Evaluation:
    """Score the studies of `embeddings` that have labels, or their scans if that is the task's unit.

    Args:
        labels: uid to (K) of 0, 1 and -1, as `labels.read_labels` gives them of the task's columns.
        templates: which of the task's; its first if None.
        allow_unmatched: leave out studies without labels and labels without a study, instead of an error.
        draws, seed: of the intervals.
        head: which of the model's embeddings; needed if it gives several.
        compared: the rows of `embeddings` are similarities to the task's prompts, as `embed` makes them.

    Raises:
        ValueError: labels and studies that do not join, which it lists; no class that can be scored; a prompt that is
            too long; embeddings of another model, of several heads, or not of the task's unit.
    """
    uids, scans, similarities = _rows(task, embeddings, head)
    if not compared:
        similarities = similarities_of(similarities, zeroshot_classifier(model, task, templates))
    lost = {uid for uid, _ in embeddings.facts.get("failed", ())} - set(uids)  # of one read in part, the rest is scored
    labels = {uid: row for uid, row in labels.items() if uid not in lost}
    notes = [f"left out {len(lost)} studies that could not be read: {', '.join(sorted(lost)[:SHOWN])}"] if lost else []
    scores = task.scores(similarities, scale_of(model))
    return measure(task, uids, scores, labels, allow_unmatched, draws, seed, scans, notes)


def measure(
    task: Task,
    uids: list[str],
    scores: np.ndarray,
    labels: Mapping[str, np.ndarray],
    allow_unmatched: bool = False,
    draws: int = metrics.DRAWS,
    seed: int = 0,
    scans: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Evaluation:
    """Compare what any model says of studies with their labels.

    Args:
        scores: (N, K), as `Task.scores` gives them.
        labels, allow_unmatched, draws, seed: as of `evaluate`.
        scans: (N) names, where scans are scored by themselves.
        notes: on what was left out before.

    Raises:
        ValueError: as `evaluate`; a study of several classes of which it can have one; a score that is not finite.
    """
    one_class = task.kind == "multi-class"
    notes = [*check_join(uids, labels, allow_unmatched), *notes]
    truth = np.array([labels.get(uid, np.full(len(task.names), MISSING)) for uid in uids])
    known = (truth == 1).any(1) if one_class else (truth != MISSING).any(1)
    joined = np.array([uid in labels for uid in uids])
    if not known[joined].all():
        what = "of none of the classes" if one_class else "without any label"
        notes.append(f"left out {int((joined & ~known).sum())} {'scans' if scans else 'studies'} {what}")
    if not known.any():
        raise ValueError(f"task {task.name}: no study has a label")
    uids, scans = (list(itertools.compress(names, known)) for names in (uids, scans))
    truth, scores = truth[known], scores[known]
    metrics.check_scores(truth, scores, uids)
    parts = _one_class(task, uids, truth, scores) if one_class else [_any_class(task, truth, scores)]
    lacking = ~(truth == 1).any(0) if one_class else ~metrics.scorable(truth)
    if lacking.any():
        names = ", ".join(itertools.compress(task.names, lacking))
        left_out = f"left out of the means, without positives or negatives: {names}"
        notes.append(f"no study of class {names}: what needs one has no value" if one_class else left_out)
    values = {key: float(value[0]) for key, value in _figures(task, parts, metrics.once(len(uids))).items()}
    if all(np.isnan(value) for value in values.values()):
        raise ValueError(f"task {task.name}: no figure can be had: {'; '.join(notes)}")
    drawn = [_figures(task, parts, counts) for counts in metrics.draw(uids, draws, seed)]
    intervals = {
        key: metrics.interval(np.concatenate([draw[key] for draw in drawn])) if drawn else None for key in values
    }
    cuts = zip(task.names, parts[0].cuts.tolist(), strict=True)
    at_cuts = not one_class and not {*metrics.AT_THRESHOLD}.isdisjoint(task.metrics)
    thresholds = dict(itertools.compress(cuts, ~lacking)) if at_cuts else {}
    return Evaluation(task, uids, truth, scores, values, intervals, thresholds, notes, scans)


def _rows(task: Task, embeddings: Embeddings, head: int | None) -> tuple[list[str], list[str], np.ndarray]:
    """Uids, names of scans (none if the task's unit is the study) and embeddings of what the task scores."""
    if task.unit == "study":
        uids, table = embeddings.of_studies(head)
        return uids, [], table
    try:
        return embeddings.of_scans(head)
    except ValueError as error:
        raise ValueError(f"task {task.name} scores scans by themselves (hlip embed --scans): {error}") from error


def _any_class(task: Task, labels: np.ndarray, scores: np.ndarray) -> Part:
    """All of a task of which a study may be of any number of classes."""
    scored = metrics.scorable(labels)
    if not scored.any():
        raise ValueError(f"task {task.name}: no class has both positive and negative studies")
    cuts = np.full(len(task.names), task.threshold if isinstance(task.threshold, float) else np.nan)
    for k in np.flatnonzero(scored & np.isnan(cuts)):
        cuts[k] = metrics.roc_threshold(labels[:, k], scores[:, k], task.threshold)
    return Part("", task.names, labels, scores, cuts)


def _one_class(task: Task, uids: Sequence[str], labels: np.ndarray, scores: np.ndarray) -> list[Part]:
    """All of a task of which a study is of one class, and its subtasks: softmax over their classes alone."""
    for row in np.flatnonzero((labels == 1).sum(1) > 1)[:1]:
        names = list(itertools.compress(task.names, labels[row] == 1))
        raise ValueError(f"task {task.name}: study {uids[row]} is of {len(names)} classes: {', '.join(names)}")
    parts = []
    for name, members in {"": task.names, **task.subtasks}.items():
        numbers = [task.names.index(member) for member in members]
        is_class = labels[:, numbers] == 1
        inside = np.where(is_class.any(1, keepdims=True), is_class, MISSING)
        shares = scores[:, numbers]
        shares = shares + (shares.sum(1, keepdims=True) == 0)  # rounded to 0: none is nearer than another
        shares /= shares.sum(1, keepdims=True)
        half = np.full(len(numbers), np.nextafter(0.5, 0))  # so that a half is positive
        parts.append(Part(f"{name}_" * bool(name), members, inside, shares, half))
    return parts


def _figures(task: Task, parts: Sequence[Part], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Values (D) by result key."""
    values = {}
    for part in parts:
        columns = {"auc": metrics.auc(part.labels, part.scores, counts)}
        columns |= metrics.at_threshold(part.labels, part.scores, part.cuts, counts)
        if task.kind == "multi-class":
            true = np.where((part.labels == 1).any(1), part.labels.argmax(1), MISSING)
            pair = len(part.names) == 2  # of which the second counts at equal shares, as in the released tools
            guess = part.scores[:, 1] >= part.scores[:, 0] if pair else part.scores.argmax(1)
            means = metrics.of_guesses(true, guess, len(part.names), counts)
            means["auc"] = columns["auc"].mean(1)
        else:
            scored = metrics.scorable(part.labels)
            means = {name: metrics.mean(column[:, scored]) for name, column in columns.items()}
        for name in task.metrics:
            values[f"{part.prefix or 'macro_' * (name == 'auc')}{name}"] = means[name]
            if not part.prefix or 2 < len(part.names) < len(task.names):  # else they are other figures once more
                of_classes = zip(part.names, columns[name].T, strict=True)
                values |= {f"{part.prefix}{label}_{name}": column for label, column in of_classes}
    for mean, members in task.means.items():
        for name in task.metrics:
            figures = np.stack([values[f"{member}_{name}"] for member in members], axis=1)
            values[f"{mean}_{name}"] = metrics.mean(figures)
    return values
