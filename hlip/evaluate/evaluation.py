"""Zero-shot evaluation: a task's scores from embeddings and prompts, and its figures with intervals.

Shapes: N studies, or scans where these are scored; K classes, T prompts (those of the classes; of a task of pairs then
the negative ones), E embedding, D draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..embed.table import Embeddings
from ..embed.texts import TextEncoder, check_lengths, embed_prompts
from ..store.store import Store
from . import bootstrap
from .metrics import AT_THRESHOLD, MISSING, at_threshold, check_scores, class_aucs, roc_threshold, scorable
from .tasks import Task

SHOWN = 10  # studies that a message names


@dataclass(frozen=True)
class Evaluation:
    """What a task found.

    uids: (N).
    scans: (N) names of scans, where each is scored by itself; none if the task scores whole studies.
    labels: (N, K) of 0, 1 and -1.
    scores: (N, K) - shares among the prompts that are compared; of kind "similarity" the cosine to the prompt.
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
    scans: list[str] = field(default_factory=list)


def evaluate(
    task: Task,
    embeddings: Embeddings,
    labels: Mapping[str, np.ndarray],
    model: TextEncoder,
    templates: str | None = None,
    allow_unmatched: bool = False,
    draws: int = bootstrap.DRAWS,
    seed: int = 0,
    head: int | None = None,
) -> Evaluation:
    """Score the studies of `embeddings` that have labels, or their scans if that is the task's unit.

    Args:
        labels: uid to (K) of 0, 1 and -1, as `labels.read_labels` and `store_labels` give them.
        templates: which of the task's; its first if None.
        allow_unmatched: leave out studies without labels and labels without a study, instead of an error.
        draws, seed: of the intervals.
        head: which of the model's embeddings; needed if it gives several.

    Raises:
        ValueError: labels and studies that do not join, which it lists; no class that can be scored; a prompt that is
            too long; embeddings of another model, of several heads, or not of the task's unit.
    """
    uids, scans, table = rows_of(task, embeddings, head)
    texts = embed_prompts(model, task_prompts(task, templates)).double().cpu().numpy()
    if texts.shape[1] != table.shape[1]:
        raise ValueError(f"the embeddings have {table.shape[1]} numbers, the model's text tower gives {texts.shape[1]}")
    scale = float(model.logit_scale.detach().exp())
    failed = [uid for uid, _ in embeddings.facts.get("failed", ())]
    similarities = table.astype(np.float64) @ texts.T
    return score(task, uids, similarities, scale, labels, allow_unmatched, draws, seed, failed, scans)


def rows_of(task: Task, embeddings: Embeddings, head: int | None = None) -> tuple[list[str], list[str], np.ndarray]:
    """Uids, names of scans (none if the task's unit is the study) and embeddings of what the task scores.

    Raises:
        ValueError: no such rows.
    """
    if task.unit == "scan":
        try:
            return embeddings.of_scans(head)
        except ValueError as error:
            raise ValueError(f"task {task.name} scores scans by themselves (hlip embed --scans): {error}") from error
    uids, table = embeddings.of_studies(head)
    return uids, [], table


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
    scans: Sequence[str] = (),
) -> Evaluation:
    """As `evaluate`, from similarities of studies to prompts, however they were had.

    Args:
        uids, similarities: (N) and (N, T), of the prompts of `task_prompts`.
        scale: the model's inverse temperature.
        failed: studies that could not be read, whose labels are left out.
        scans: (N) - which scan of its study a row is of, if the rows are scans.
    """
    gone = set(failed) - set(uids)  # of a study that could be read in part, the rest is scored
    labels = {uid: each for uid, each in labels.items() if uid not in gone}
    notes = check_join(uids, labels, allow_unmatched)
    if gone:
        notes.append(f"left out {len(gone)} studies that could not be read: {', '.join(sorted(gone)[:SHOWN])}")
    kept = [i for i, uid in enumerate(uids) if uid in labels]
    uids, scans = [uids[i] for i in kept], [scans[i] for i in kept] if scans else []
    truth = np.stack([labels[uid] for uid in uids])
    scores = class_scores(task, similarities[kept], scale)
    known = (truth == 1).any(1) if task.kind == "multi-class" else (truth != MISSING).any(1)
    if not known.all():
        what = "of none of the classes" if task.kind == "multi-class" else "without any label"
        notes.append(f"left out {int((~known).sum())} {'scans' if scans else 'studies'} {what}")
        truth, scores = truth[known], scores[known]
        uids, scans = (list(itertools.compress(each, known)) for each in (uids, scans))
    if not uids:
        raise ValueError(f"task {task.name}: no study has a label")
    find = _multi_class if task.kind == "multi-class" else _multi_label
    return replace(find(task, uids, truth, scores, notes, draws, seed), scans=scans)


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


def unjoined(uids: Sequence[str], labels: Mapping[str, np.ndarray]) -> tuple[list[str], list[str]]:
    """The studies without labels, and the labels without a study, each in its order."""
    studies = dict.fromkeys(uids)
    return [uid for uid in studies if uid not in labels], [uid for uid in labels if uid not in studies]


def check_join(uids: Sequence[str], labels: Mapping[str, np.ndarray], allow_unmatched: bool) -> list[str]:
    """Notes on the studies without labels and the labels without a study.

    Raises:
        ValueError: there are such, unless `allow_unmatched`; or nothing joins at all.
    """
    what = ("studies have no labels", "labels have no study")
    notes = [
        f"{len(lost)} {name}: {', '.join(lost[:SHOWN])}{', ...' if len(lost) > SHOWN else ''}"
        for name, lost in zip(what, unjoined(uids, labels), strict=True)
        if lost
    ]
    if not set(uids) & labels.keys():
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
    """(N, T) similarities to (N, K) float64: shares, or the similarities if the task's kind is "similarity".

    Softmax is at the model's own temperature: of pairs over the two prompts of a class, of multi-class over the
    classes.
    """
    if task.kind == "similarity":
        return similarities
    logits = scale * similarities.astype(np.float64)
    if task.kind == "pairs":
        logits = logits.reshape(len(logits), 2, -1).swapaxes(1, 2)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return shares if task.kind == "multi-class" else shares[..., 0]


def _draw(uids: Sequence[str], draws: int, seed: int) -> Iterator[np.ndarray]:
    """As `bootstrap.draw`, but of rows: a study is drawn with all its scans."""
    places = {uid: place for place, uid in enumerate(dict.fromkeys(uids))}
    rows = np.array([places[uid] for uid in uids])
    for counts in bootstrap.draw(len(places), draws, seed):
        yield counts[:, rows]


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
    for counts in _draw(uids, draws, seed):
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
    if lacking := [name for k, name in enumerate(task.classes) if not one_hot[:, k].any()]:
        notes = [*notes, f"no study of class {', '.join(lacking)}: what needs one has no value"]
    subtasks = [_Subtask.of(f"{name}_", members, task, true, scores) for name, members in task.subtasks.items()]
    whole = _Subtask.of("", task.classes, task, true, scores)
    metrics: dict[str, float] = {}
    if "auc" in task.metrics:
        aucs = class_aucs(one_hot, scores)
        metrics |= {"macro_auc": float(aucs.mean())}
        metrics |= {f"{name}_auc": float(value) for name, value in zip(task.classes, aucs, strict=True)}
    for part in subtasks or [whole]:
        metrics |= part.figures(task.metrics)
    drawn: dict[str, list[np.ndarray]] = {key: [] for key in metrics}
    for counts in _draw(uids, draws, seed):
        found: dict[str, np.ndarray] = {}
        if "auc" in task.metrics:
            columns = [bootstrap.auc(one_hot[:, k], scores[:, k], counts) for k in range(len(task.classes))]
            found |= {"macro_auc": bootstrap.mean(np.stack(columns, axis=1))}
            found |= {f"{name}_auc": column for name, column in zip(task.classes, columns, strict=True)}
        for part in subtasks or [whole]:
            found |= part.drawn(task.metrics, counts)
        for key, values in found.items():
            drawn[key].append(values)
    if all(np.isnan(value) for value in metrics.values()):
        raise ValueError(f"task {task.name}: no figure can be had: {'; '.join(notes)}")
    intervals = {key: bootstrap.interval(np.concatenate(each)) if each else None for key, each in drawn.items()}
    return Evaluation(task, uids, labels, scores, metrics, intervals, {}, notes)


@dataclass(frozen=True)
class _Subtask:
    """Some classes of a multi-class task: (n) of them.

    prefix: of its result keys; empty if it is the whole task, whose AUC has another name.
    true: (N) - each study's class, as its place among them; -1 of a study of none of them.
    scores: (N, n) - softmax over them alone.
    """

    prefix: str
    true: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, prefix: str, members: Sequence[str], task: Task, true: np.ndarray, scores: np.ndarray) -> _Subtask:
        """Args: true, scores: of all the task's classes."""
        numbers = [task.classes.index(name) for name in members]
        places = np.full(len(task.classes), MISSING)
        places[numbers] = np.arange(len(numbers))
        chosen = scores[:, numbers]
        return cls(prefix, places[true], chosen / chosen.sum(1, keepdims=True))

    @property
    def guess(self) -> np.ndarray:
        return self.scores.argmax(1)

    @property
    def columns(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each class, labels of 0, 1 and -1, and scores."""
        for k in range(self.scores.shape[1]):
            yield np.where(self.true == MISSING, MISSING, self.true == k), self.scores[:, k]

    def figures(self, names: Collection[str]) -> dict[str, float]:
        """Not-a-number where one of the classes has no study."""
        from sklearn.metrics import balanced_accuracy_score, f1_score

        inside = self.true != MISSING
        true, guess = self.true[inside], self.guess[inside]
        whole = len(set(true.tolist())) == self.scores.shape[1]
        found = {}
        if "balanced_accuracy" in names:
            found["balanced_accuracy"] = balanced_accuracy_score(true, guess) if whole else np.nan
        if "weighted_f1" in names:
            found["weighted_f1"] = f1_score(true, guess, average="weighted", zero_division=0) if whole else np.nan
        if "auc" in names and self.prefix:
            columns = [np.stack(each, 1) for each in zip(*self.columns, strict=True)]
            found["auc"] = class_aucs(*columns).mean()
        return {f"{self.prefix}{name}": float(value) for name, value in found.items()}

    def drawn(self, names: Collection[str], counts: np.ndarray) -> dict[str, np.ndarray]:
        """The same figures of draws, (D, N), each (D)."""
        size = self.scores.shape[1]
        found = {}
        if "balanced_accuracy" in names:
            found["balanced_accuracy"] = bootstrap.balanced_accuracy(self.true, self.guess, size, counts)
        if "weighted_f1" in names:
            found["weighted_f1"] = bootstrap.weighted_f1(self.true, self.guess, size, counts)
        if "auc" in names and self.prefix:
            aucs = [bootstrap.auc(labels, scores, counts) for labels, scores in self.columns]
            found["auc"] = np.mean(aucs, axis=0)
        return {f"{self.prefix}{name}": values for name, values in found.items()}
