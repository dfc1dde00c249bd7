"""Zero-shot classification: what studies show, by the likeness of their embeddings to those of a task's prompts; and
its evaluation, a task's figures with intervals.

Shapes: N studies, or scans where these are scored; K classes, T prompts (see `tasks`), E embedding, D draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

Figures = Callable[[np.ndarray], dict[str, np.ndarray]]  # counts (D, N) to values (D) by result key


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
    notes = check_join(uids, labels, allow_unmatched)
    if lost:
        notes.append(f"left out {len(lost)} studies that could not be read: {', '.join(sorted(lost)[:SHOWN])}")
    truth = np.array([labels.get(uid, np.full(len(task.names), MISSING)) for uid in uids])
    known = (truth == 1).any(1) if task.kind == "multi-class" else (truth != MISSING).any(1)
    joined = np.array([uid in labels for uid in uids])
    if not known[joined].all():
        what = "of none of the classes" if task.kind == "multi-class" else "without any label"
        notes.append(f"left out {int((joined & ~known).sum())} {'scans' if scans else 'studies'} {what}")
    if not known.any():
        raise ValueError(f"task {task.name}: no study has a label")
    uids, scans = (list(itertools.compress(names, known)) for names in (uids, scans))
    truth, scores = truth[known], task.scores(similarities[known], scale_of(model))
    find = _multi_class if task.kind == "multi-class" else _multi_label
    figures, thresholds, more = find(task, uids, truth, scores)
    values = {key: float(value[0]) for key, value in figures(metrics.once(len(uids))).items()}
    if all(np.isnan(value) for value in values.values()):
        raise ValueError(f"task {task.name}: no figure can be had: {'; '.join(notes + more)}")
    drawn = [figures(counts) for counts in _draw(uids, draws, seed)]
    intervals = {
        key: metrics.interval(np.concatenate([draw[key] for draw in drawn])) if drawn else None for key in values
    }
    return Evaluation(task, uids, truth, scores, values, intervals, thresholds, notes + more, scans)


def _rows(task: Task, embeddings: Embeddings, head: int | None) -> tuple[list[str], list[str], np.ndarray]:
    """Uids, names of scans (none if the task's unit is the study) and embeddings of what the task scores."""
    if task.unit == "study":
        uids, table = embeddings.of_studies(head)
        return uids, [], table
    try:
        return embeddings.of_scans(head)
    except ValueError as error:
        raise ValueError(f"task {task.name} scores scans by themselves (hlip embed --scans): {error}") from error


def _draw(uids: Sequence[str], draws: int, seed: int) -> Iterator[np.ndarray]:
    """As `metrics.draw`, but of rows: a study is drawn with all its scans."""
    places = {uid: place for place, uid in enumerate(dict.fromkeys(uids))}
    rows = np.array([places[uid] for uid in uids])
    for counts in metrics.draw(len(places), draws, seed):
        yield counts[:, rows]


def _multi_label(
    task: Task, uids: list[str], labels: np.ndarray, scores: np.ndarray
) -> tuple[Figures, dict[str, float], list[str]]:
    """The task's figures as a function of counts, thresholds by class, and notes."""
    metrics.check_scores(labels, scores, uids)
    scored = np.flatnonzero(metrics.scorable(labels))
    if len(scored) == 0:
        raise ValueError(f"task {task.name}: no class has both positive and negative studies")
    lacking = [name for k, name in enumerate(task.names) if k not in scored]
    notes = [f"left out of the means, without positives or negatives: {', '.join(lacking)}"] if lacking else []
    at_threshold = [name for name in task.metrics if name in metrics.AT_THRESHOLD]
    thresholds = {
        task.names[k]: task.threshold
        if isinstance(task.threshold, float)
        else metrics.roc_threshold(labels[:, k], scores[:, k], task.threshold)
        for k in (scored.tolist() if at_threshold else ())
    }
    # Of a class that cannot be scored, every draw is not-a-number, whatever the threshold.
    cuts = np.array([thresholds.get(name, 0.5) for name in task.names])

    def figures(counts: np.ndarray) -> dict[str, np.ndarray]:
        columns = {"auc": metrics.auc(labels, scores, counts)}
        columns |= metrics.at_threshold(labels, scores, cuts, counts) if at_threshold else {}
        values = {}
        for name, key in zip(task.metrics, task.headline, strict=True):
            values[key] = metrics.mean(columns[name][:, scored])
            values |= {f"{task.names[k]}_{name}": column for k, column in enumerate(columns[name].T)}
        return values

    return figures, thresholds, notes


def _multi_class(
    task: Task, uids: list[str], labels: np.ndarray, scores: np.ndarray
) -> tuple[Figures, dict[str, float], list[str]]:
    """As `_multi_label`."""
    for row in np.flatnonzero((labels == 1).sum(1) > 1)[:1]:
        names = [name for name, label in zip(task.names, labels[row], strict=True) if label == 1]
        raise ValueError(f"task {task.name}: study {uids[row]} is of {len(names)} classes: {', '.join(names)}")
    true = labels.argmax(1)
    one_hot = (true[:, None] == np.arange(len(task.names))).astype(np.int64)
    metrics.check_scores(one_hot, scores, uids)
    lacking = [name for k, name in enumerate(task.names) if not one_hot[:, k].any()]
    notes = [f"no study of class {', '.join(lacking)}: what needs one has no value"] if lacking else []
    subtasks = [_subtask(f"{name}_", members, task, true, scores) for name, members in task.subtasks.items()]
    subtasks = subtasks or [_subtask("", task.names, task, true, scores)]
    whole = metrics.scorable(one_hot).all()

    def figures(counts: np.ndarray) -> dict[str, np.ndarray]:
        values = {}
        if "auc" in task.metrics:
            aucs = metrics.auc(one_hot, scores, counts)
            values["macro_auc"] = metrics.mean(aucs) if whole else np.full(len(counts), np.nan)
            values |= {f"{name}_auc": column for name, column in zip(task.names, aucs.T, strict=True)}
        for subtask in subtasks:
            values |= subtask(counts)
        return values

    return figures, {}, notes


def _subtask(prefix: str, members: Sequence[str], task: Task, true: np.ndarray, scores: np.ndarray) -> Figures:
    """The figures of some classes of a multi-class task, by softmax over them alone.

    Args:
        prefix: of its result keys; empty if it is the whole task, whose AUC has another name.
        true, scores: of all the task's classes.
    """
    numbers = [task.names.index(name) for name in members]
    places = np.full(len(task.names), MISSING)
    places[numbers] = np.arange(len(numbers))
    place = places[true]  # of a study's class among the members; -1 of one of none of them
    chosen = scores[:, numbers] / scores[:, numbers].sum(1, keepdims=True)
    labels = np.where(place[:, None] == MISSING, MISSING, place[:, None] == np.arange(len(numbers)))

    def figures(counts: np.ndarray) -> dict[str, np.ndarray]:
        values = metrics.of_guesses(place, chosen.argmax(1), len(numbers), counts)
        if prefix:
            values["auc"] = metrics.auc(labels, chosen, counts).mean(1)
        return {f"{prefix}{name}": column for name, column in values.items() if name in task.metrics}

    return figures
