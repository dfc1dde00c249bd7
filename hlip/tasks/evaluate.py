"""Zero-shot evaluation: a task's scores from embeddings and prompts, and its figures with intervals.

Shapes: N studies, K classes, T prompts (those of the classes; of a task of pairs then the negative ones), E embedding,
D draws.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..data.store import Store
from . import bootstrap
from .embeddings import Embeddings
from .metrics import AT_THRESHOLD, MISSING, at_threshold, check_scores, class_aucs, roc_threshold, scorable
from .task import Task
from .texts import TextEncoder, check_lengths, embed_prompts

SHOWN = 10  # studies that a message names


@dataclass(frozen=True)
class Evaluation:
    """What a task found.

    uids: (N).
    labels: (N, K) of 0, 1 and -1.
    scores: (N, K) - probabilities; of kind "similarity" the cosine to the prompt.
    metrics: result keys to values; not-a-number where labels allow none.
    intervals: of the same keys, 95% by drawing studies; None where no draw has a value.
    thresholds: of the classes of a task of pairs.
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


def evaluate(
    task: Task,
    embeddings: Embeddings,
    labels: Mapping[str, np.ndarray],
    model: TextEncoder,
    templates: str | None = None,
    allow_unmatched: bool = False,
    draws: int = bootstrap.DRAWS,
    seed: int = 0,
) -> Evaluation:
    """Score the studies of `embeddings` (head 0) that have labels.

    Args:
        labels: uid to (K) of 0, 1 and -1, as `labels.read_labels` and `store_labels` give them.
        templates: which of the task's; its first if None.
        allow_unmatched: leave out studies without labels and labels without a study, instead of an error.
        draws, seed: of the intervals.

    Raises:
        ValueError: labels and studies that do not join, which it lists; no class that can be scored; a prompt that is
            too long; embeddings of another model.
    """
    uids, table = embeddings.of_studies()
    texts = embed_prompts(model, task_prompts(task, templates)).double().cpu().numpy()
    if texts.shape[1] != table.shape[1]:
        raise ValueError(f"the embeddings have {table.shape[1]} numbers, the model's text tower gives {texts.shape[1]}")
    scale = float(model.logit_scale.detach().exp())
    failed = [uid for uid, _ in embeddings.facts.get("failed", ())]
    return score(task, uids, table.astype(np.float64) @ texts.T, scale, labels, allow_unmatched, draws, seed, failed)


def score(
    task: Task,
    uids: Sequence[str],
    similarities: np.ndarray,
    scale: float,
    labels: Mapping[str, np.ndarray],
    allow_unmatched: bool = False,
    draws: int = bootstrap.DRAWS,
    seed: int = 0,
    failed: Collection[str] = (),
) -> Evaluation:
    """As `evaluate`, from similarities of studies to prompts, however they were had.

    Args:
        uids, similarities: (N) and (N, T), of the prompts of `task_prompts`.
        scale: the model's inverse temperature.
        failed: studies that could not be read, whose labels are left out.
    """
    labels = {uid: each for uid, each in labels.items() if uid not in set(failed)}
    notes = check_join(uids, labels, allow_unmatched)
    if failed:
        notes.append(f"left out {len(failed)} studies that could not be read: {', '.join(sorted(failed)[:SHOWN])}")
    kept = [i for i, uid in enumerate(uids) if uid in labels]
    uids = [uids[i] for i in kept]
    truth = np.stack([labels[uid] for uid in uids])
    scores = class_scores(task, similarities[kept], scale)
    known = (truth == 1).any(1) if task.kind == "multi-class" else (truth != MISSING).any(1)
    if not known.all():
        what = "of none of the classes" if task.kind == "multi-class" else "without any label"
        notes.append(f"left out {int((~known).sum())} studies {what}")
        uids, truth, scores = [uid for uid, keep in zip(uids, known, strict=True) if keep], truth[known], scores[known]
    if not uids:
        raise ValueError(f"task {task.name}: no study has a label")
    find = _multi_class if task.kind == "multi-class" else _multi_label
    return find(task, uids, truth, scores, notes, draws, seed)


def store_labels(store: Store, task: Task) -> dict[str, np.ndarray]:
    """The labels that a store holds for the task's classes; missing ones are -1.

    Raises:
        ValueError: the store has no label of a class, or one that is neither 0, 1 nor -1; names it.
    """
    names, values = store.labels
    absent = [column for column in task.columns.values() if column not in names]
    if absent:
        raise ValueError(
            f"{store.path}: the store has no labels {', '.join(dict.fromkeys(absent))} (it has "
            f"{', '.join(names) or 'none'}): give --labels, or the task's `columns`"
        )
    values = values[:, [names.index(column) for column in task.columns.values()]]
    values = np.where(np.isnan(values), MISSING, values)
    if not np.isin(values, (0, 1, MISSING)).all():
        row, column = (int(i) for i in np.argwhere(~np.isin(values, (0, 1, MISSING)))[0])
        raise ValueError(
            f"{store.path}: study {store.uids[row]}: the label {task.classes[column]} is {values[row, column]:g}"
        )
    return dict(zip(store.uids.tolist(), values.astype(np.int64), strict=True))


def check_join(uids: Sequence[str], labels: Mapping[str, np.ndarray], allow_unmatched: bool) -> list[str]:
    """Notes on the studies without labels and the labels without a study.

    Raises:
        ValueError: there are such, unless `allow_unmatched`; or nothing joins at all.
    """
    present = set(uids)
    lacking = [uid for uid in uids if uid not in labels]
    unused = [uid for uid in labels if uid not in present]
    notes = [
        f"{len(lost)} {what}: {', '.join(lost[:SHOWN])}{', ...' if len(lost) > SHOWN else ''}"
        for what, lost in (("studies have no labels", lacking), ("labels have no study", unused))
        if lost
    ]
    if len(lacking) == len(uids):
        raise ValueError(f"no study has labels; {'; '.join(notes)}")
    if notes and not allow_unmatched:
        raise ValueError(f"labels and studies do not join: {'; '.join(notes)} (--allow_unmatched leaves them out)")
    return notes


def task_prompts(task: Task, templates: str | None = None) -> list[list[str]]:
    """The sentences of T prompts: of each class, and of a task of pairs then of what each is told from.

    Raises:
        ValueError: the task has no such templates.
    """
    return [*task.sentences(task.positive, templates).values(), *task.sentences(task.negative, templates).values()]


def check_prompts(task: Task, model: TextEncoder, templates: str | None = None) -> None:
    """Raises ValueError where the task has no such templates, or a prompt is too long for the model."""
    check_lengths(model, [text for texts in task_prompts(task, templates) for text in texts])


def class_scores(task: Task, similarities: np.ndarray, scale: float) -> np.ndarray:
    """(N, T) similarities to (N, K) float64: probabilities, or the similarities if the task's kind is "similarity".

    Softmax is at the model's own temperature: of pairs over the two prompts of a class, of multi-class over the
    classes.
    """
    if task.kind == "similarity":
        return similarities
    logits = scale * similarities.astype(np.float64)
    if task.kind == "pairs":
        logits = logits.reshape(len(logits), 2, -1).swapaxes(1, 2)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    return probabilities if task.kind == "multi-class" else probabilities[..., 0]


def _multi_label(
    task: Task, uids: list[str], labels: np.ndarray, scores: np.ndarray, notes: list[str], draws: int, seed: int
) -> Evaluation:
    check_scores(labels, scores, uids)
    scored = np.flatnonzero(scorable(labels))
    if len(scored) == 0:
        raise ValueError(f"task {task.name}: no class has both positive and negative studies")
    if len(scored) < len(task.classes):
        lacking = [name for k, name in enumerate(task.classes) if k not in scored]
        notes = [*notes, f"left out of the means, without positives or negatives: {', '.join(lacking)}"]
    points: dict[str, np.ndarray] = {name: np.full(len(task.classes), np.nan) for name in task.metrics}
    points["auc"] = class_aucs(labels, scores)
    thresholds = {}
    if set(task.metrics) & set(AT_THRESHOLD):
        for k in scored.tolist():
            known = labels[:, k] != MISSING
            thresholds[task.classes[k]] = roc_threshold(labels[known, k], scores[known, k])
            found = at_threshold(labels[known, k], scores[known, k], thresholds[task.classes[k]])
            for name in set(task.metrics) & set(found):
                points[name][k] = found[name]
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in task.metrics}
    for counts in bootstrap.draw(len(uids), draws, seed):
        columns: dict[str, list[np.ndarray]] = {name: [] for name in task.metrics}
        for k in range(len(task.classes)):
            # Of a class that cannot be scored, every draw is not-a-number, whatever the threshold.
            threshold = thresholds.get(task.classes[k], 0.5)
            found_k = bootstrap.at_threshold(labels[:, k], scores[:, k], threshold, counts) if thresholds else {}
            found_k["auc"] = bootstrap.auc(labels[:, k], scores[:, k], counts)
            for name in task.metrics:
                columns[name].append(found_k[name])
        for name in task.metrics:
            drawn[name].append(np.stack(columns[name], axis=1))
    metrics, intervals = {}, {}
    for name, key in zip(task.metrics, task.headline, strict=True):
        values = np.concatenate(drawn[name]) if drawn[name] else np.empty((0, len(task.classes)))
        metrics[key] = float(points[name][scored].mean())
        intervals[key] = bootstrap.interval(bootstrap.mean(values[:, scored]))
        for k, each in enumerate(task.classes):
            metrics[f"{each}_{name}"] = float(points[name][k])
            intervals[f"{each}_{name}"] = bootstrap.interval(values[:, k])
    return Evaluation(task, uids, labels, scores, metrics, intervals, thresholds, notes)


def _multi_class(
    task: Task, uids: list[str], labels: np.ndarray, scores: np.ndarray, notes: list[str], draws: int, seed: int
) -> Evaluation:
    several = np.flatnonzero((labels == 1).sum(1) > 1)
    if len(several):
        row = int(several[0])
        names = [name for name, label in zip(task.classes, labels[row], strict=True) if label == 1]
        raise ValueError(f"task {task.name}: study {uids[row]} is of {len(names)} classes: {', '.join(names)}")
    true = labels.argmax(1)
    one_hot = (true[:, None] == np.arange(len(task.classes))).astype(np.int64)
    check_scores(one_hot, scores, uids)
    subtasks = {f"{name}_": members for name, members in task.subtasks.items()} or {"": tuple(task.classes)}
    numbers = {name: [task.classes.index(each) for each in members] for name, members in subtasks.items()}
    # A study's class among those of a subtask, and the likeliest; softmax over fewer classes has the same order.
    truths = {name: _places(true, members) for name, members in numbers.items()}
    guesses = {name: scores[:, members].argmax(1) for name, members in numbers.items()}
    lacking = [name for k, name in enumerate(task.classes) if not one_hot[:, k].any()]
    if lacking:
        notes = [*notes, f"no study of class {', '.join(lacking)}: what needs one has no value"]
    metrics: dict[str, float] = {}
    drawn: dict[str, list[np.ndarray]] = {}
    if "balanced_accuracy" in task.metrics:
        for name in subtasks:
            metrics[f"{name}balanced_accuracy"] = _balanced_accuracy(truths[name], guesses[name], len(numbers[name]))
    if "auc" in task.metrics:
        aucs = class_aucs(one_hot, scores)
        metrics["macro_auc"] = float(aucs.mean())
        metrics |= {f"{name}_auc": float(value) for name, value in zip(task.classes, aucs, strict=True)}
    for counts in bootstrap.draw(len(uids), draws, seed):
        found: dict[str, np.ndarray] = {}
        if "balanced_accuracy" in task.metrics:
            for name in subtasks:
                found[f"{name}balanced_accuracy"] = bootstrap.balanced_accuracy(
                    truths[name], guesses[name], len(numbers[name]), counts
                )
        if "auc" in task.metrics:
            columns = [bootstrap.auc(one_hot[:, k], scores[:, k], counts) for k in range(len(task.classes))]
            found["macro_auc"] = bootstrap.mean(np.stack(columns, axis=1))
            found |= {f"{name}_auc": column for name, column in zip(task.classes, columns, strict=True)}
        for key, values in found.items():
            drawn.setdefault(key, []).append(values)
    if all(np.isnan(value) for value in metrics.values()):
        raise ValueError(f"task {task.name}: no figure can be had: {'; '.join(notes)}")
    intervals = {key: bootstrap.interval(np.concatenate(drawn[key])) if drawn else None for key in metrics}
    return Evaluation(task, uids, labels, scores, metrics, intervals, {}, notes)


def _places(true: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Where each study's class stands among `members`; -1 if it does not."""
    places = np.full(len(true), MISSING)
    for place, k in enumerate(members):
        places[true == k] = place
    return places


def _balanced_accuracy(true: np.ndarray, found: np.ndarray, classes: int) -> float:
    """Over the studies whose class is not -1; not-a-number where one of the classes does not occur."""
    from sklearn.metrics import balanced_accuracy_score

    inside = true != MISSING
    if len(set(true[inside].tolist())) < classes:
        return float("nan")
    # Only classes that occur are averaged over, and all do.
    return float(balanced_accuracy_score(true[inside], found[inside]))
