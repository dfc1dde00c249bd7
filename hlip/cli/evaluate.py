"""`hlip eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import OneOf, argument
from ..embed.baselines import PREFIX, SliceEncoder
from ..embed.inputs import StoreStudies
from ..embed.texts import check_lengths
from ..evaluate.evaluation import Evaluation, evaluate, measure
from ..evaluate.labels import check_join, read_labels, unjoined
from ..evaluate.metrics import need_sklearn
from ..evaluate.report import (
    MARKDOWN,
    METRICS,
    PLOT,
    SCORES,
    TABLE,
    class_rows,
    sizes,
    table_rows,
    write_evaluation,
)
from ..evaluate.scores import read_scores
from ..evaluate.tasks import Task, list_tasks, load_task
from ..model.clip import HLIPModel
from ..output import shown_name, table, write_csv
from ..processes import processes
from ..store.store import Store
from ..terminal import say
from .shared import (
    EMBEDDINGS,
    ENCODER,
    FIGURES,
    RESULTS,
    SIMILARITIES,
    TEMPLATES,
    add_command,
    check_results,
    embedding_arguments,
    embedding_options,
    embeddings_of,
    load_encoder,
    open_studies,
    report_failed,
)

UNMATCHED = "unmatched.csv"
DESCRIPTION = """\
Embed studies, compare them with a task's prompts, and compare what comes out with labels. Whatever ends the job, the
same command goes on where it stopped."""
EPILOG = f"""\
writes into FOLDER:
  {SCORES:17}  a row a study: each class' share among the prompts it is told from (of kind similarity: the cosine with
                     its prompt), and label
  {METRICS:17}  all figures with 95% intervals by drawing studies, numbers of labels, what was left out
  {TABLE:17}  the table that is printed: this run beside published figures, in percent
  {MARKDOWN:17}  the same
  {PLOT:17}  ROC curves, or the confusion matrix
  {EMBEDDINGS:17}  of the studies, which another task can read (--embeddings); of a 2D model instead
  {SIMILARITIES:17}  each study's similarities to the prompts
  {UNMATCHED:17}  studies without labels and labels without a study, if there are any

A task of your own is a YAML file:
  kind: multi-class                      # or pairs, or similarity
  classes:
    normal: no significant abnormality   # of pairs: {{positive: Emphysema, negative: Not emphysema}}
    glioma: [glioma, infiltrating glial tumor]
  templates: ["This MRI study shows: {{}}."]
  columns: {{glioma: GLIOMA}}              # in the label table, where it is not the class' name
and a CSV with a column `study`, and one for each class: 0, 1, or -1 or empty where it is not known. The reference of
hlip.evaluate.tasks lists all fields. `hlip zeroshot` and `hlip interpret` read the same file.

Baselines: --one_scan SEED shows any model one random scan of each study. A 2D model sees slice after slice of a store;
its similarity to a prompt is the mean (--pool mean: over a scan's slices, then over scans) or the largest (--pool max)
of its slices', and softmax is at its own temperature.

With --scores no model is run: a row a study (or, of a task of scans, a scan: a column `scan`), a column a class, as in
{SCORES}. Of a task of pairs or of your own they are probabilities of the class, of multi-class the classes' shares,
which add up to 1, of similarity any number. Classes that the task merges may have their own columns.

Under torchrun processes share the work, and change no figure. Exit status as of `hlip embed`."""


def add(commands: Any) -> None:
    """Add `eval` to the subparsers of `hlip`."""
    model, *encoder = ENCODER
    add_command(
        commands,
        "eval",
        _eval,
        "evaluate a model zero-shot on a benchmark or a task of your own",
        DESCRIPTION,
        [
            argument("task", metavar="TASK", help=f"{', '.join(list_tasks())}, or FILE.yaml"),
            OneOf(
                (
                    argument("--data", type=Path, metavar="INPUT", help="a store, or a study list (.json, .csv)"),
                    argument("--embeddings", type=Path, metavar="FILE", help="what `hlip embed` wrote with this model"),
                    argument(
                        "--scores",
                        type=Path,
                        metavar="CSV",
                        help="what any model says, in place of --model: a column `study`, and one for each class with "
                        "its probability (of kind similarity: its similarity)",
                    ),
                ),
                required=True,
            ),
            argument("--labels", type=Path, metavar="CSV", help="label table (default: the store's labels)"),
            RESULTS,
            TEMPLATES,
            argument(
                "--allow_unmatched",
                action="store_true",
                help="leave out studies without labels and labels without a study, instead of stopping",
            ),
            *FIGURES,
            model._replace(settings=model.settings | {"required": False}),
            *encoder,
            *embedding_arguments(),
        ],
        EPILOG,
    )


def _eval(args: argparse.Namespace) -> int:
    need_sklearn()  # said now, not after hours
    check_results(args.out)
    task = load_task(args.task)
    if args.scores is not None:
        return _of_scores(args, task)
    if args.model is None:
        raise ValueError("--model is needed, unless --scores holds what a model said")
    prompts = task.prompts(args.templates)  # says so if there are no such templates
    if args.embeddings is not None and args.model.startswith(PREFIX):
        raise ValueError("--embeddings: a 2D model is scored by its slices; give --data")
    if args.embeddings is not None and args.one_scan is not None:
        raise ValueError("--one_scan: give it to hlip embed, or --data in place of --embeddings")
    options = embedding_options(args, task.unit)
    labels = _labels(args, task)
    with processes() as among:
        model = load_encoder(args)
        _check_head(args.head, model)
        check_lengths(model, [text for sentences in prompts for text in sentences])
        studies = open_studies([args.data], model) if args.data else None
        if studies is not None and not isinstance(studies, StoreStudies):  # of a store it was said before
            _check_join(args, [*studies.uids, *(uid for uid, _ in studies.lost)], labels)
        of_slices = isinstance(model, SliceEncoder)
        made = embeddings_of(args, model, studies, options, among, prompts if of_slices else None)
        if made is not None and studies is None:
            _check_join(args, [*made.study.tolist(), *(uid for uid, _ in made.facts.get("failed", ()))], labels)
    if made is None:
        return 0
    scored = evaluate(
        task,
        made,
        labels,
        model,
        args.templates,
        args.allow_unmatched,
        args.draws,
        args.seed,
        args.head,
        compared=of_slices,
    )
    if isinstance(studies, StoreStudies):
        scored.notes.extend(task.notes_on_shapes(np.unique(studies.store.shapes, axis=0).tolist()))
    elif isinstance(model, HLIPModel) and studies is not None:
        scored.notes.extend(task.notes_on_shapes([model.config.preprocess.shape]))
    facts = {
        "model": shown_name(args.model),
        "data": shown_name(args.data or args.embeddings),
        "labels": args.labels and shown_name(args.labels),
        "templates": args.templates or next(iter(task.templates)),
        "one_scan": made.facts.get("job", {}).get("one_scan"),
        **({"pool": model.pool, "slices": args.slices and args.slices.name} if isinstance(model, SliceEncoder) else {}),
        "draws": args.draws,
        "seed": args.seed,
        "left_out": made.facts.get("failed", []),
        "left_out_scans": made.facts.get("left_out", []),
    }
    _write(args, scored, facts)
    return report_failed(made, "eval")


def _of_scores(args: argparse.Namespace, task: Task) -> int:
    """Evaluate what a table says of studies; no model has a part in it."""
    for flag in ("model", "templates", "head", "one_scan", "pool", "slices"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: has no part where --scores says what to compare with labels. Leave it out")
    uids, scans, scores = read_scores(args.scores, task)
    labels = _labels(args, task)
    _check_join(args, uids, labels)
    facts = {"scores": shown_name(args.scores), "labels": shown_name(args.labels)}
    scored = measure(task, uids, scores, labels, args.allow_unmatched, args.draws, args.seed, scans)
    _write(args, scored, facts | {"draws": args.draws, "seed": args.seed})
    return 0


def _write(args: argparse.Namespace, scored: Evaluation, facts: dict[str, Any]) -> None:
    write_evaluation(scored, args.out, facts)
    say(f"{scored.task.name}: {sizes(scored)}; percent, with 95% intervals")
    say(*table(zip(*table_rows(scored), strict=True)))
    if len(rows := class_rows(scored)) > 1 and len(rows[0]) > 3:
        say("", *table(rows))
    say(*(f"note: {note}" for note in scored.notes))
    say(f"{args.out}: {', '.join([SCORES, METRICS, TABLE, MARKDOWN, PLOT])}")


def _check_head(head: int | None, model: HLIPModel | SliceEncoder) -> None:
    """Raises ValueError where the model has no such embedding, or several and none is chosen."""
    count = model.config.vision.num_outputs if isinstance(model, HLIPModel) and model.config.per_prefix else 1
    if head is None and count > 1:
        raise ValueError(
            f"the model gives {count} embeddings of a study: choose --head, 0 to {count - 1} (0 is for zero-shot "
            "classification)"
        )
    if head is not None and not 0 <= head < count:
        raise ValueError(f"--head {head}: the model gives {count} embedding{'s' * (count > 1)} of a study, from 0")


def _labels(args: argparse.Namespace, task: Task) -> Mapping[str, np.ndarray]:
    """Of the table, or of the store; what does not join with a store is said now, not after hours."""
    store = Store(args.data) if args.data is not None and (args.data / "shards").is_dir() else None
    if args.data is not None and args.data.is_dir() and store is None:
        raise ValueError(f"{args.data}: expected a store, or a study list (.json, .csv)")
    source = store if args.labels is None else args.labels
    if source is None:
        raise ValueError(
            f"--labels is needed: {args.data or args.embeddings or args.scores} is no store, which could have labels"
        )
    labels = read_labels(source, task.label_columns, task.study)
    if store is not None:
        _check_join(args, store.uids.tolist(), labels)
    return labels


def _check_join(args: argparse.Namespace, uids: Sequence[str], labels: Mapping[str, np.ndarray]) -> None:
    """As `check_join`, and leave the whole list in a file, as messages name only some."""
    path = args.out / UNMATCHED
    lacking, unused = unjoined(uids, labels)
    if not lacking and not unused:
        path.unlink(missing_ok=True)
        return
    write_csv(path, [["study", "has no"], *((uid, "labels") for uid in lacking), *((uid, "study") for uid in unused)])
    try:
        check_join(uids, labels, args.allow_unmatched)
    except ValueError as error:
        raise ValueError(f"{error}; all are in {path}") from error
