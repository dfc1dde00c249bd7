"""What commands have in common: the model, the task, studies, and what they say of those that are left out."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from tqdm import tqdm

from ..arguments import Argument, OneOf, add_arguments, argument, at_least, field_argument
from ..embed.baselines import PREFIX, Pool, SliceEncoder, read_slices
from ..embed.encoders import model_digest
from ..embed.inputs import FileStudies, ListedStudies, StoreStudies, Studies, study_names, unlike
from ..embed.loop import Options, Unit, embed
from ..embed.open_clip import HUB
from ..embed.parts import parts_of
from ..embed.table import Embeddings
from ..evaluate.labels import SHOWN
from ..evaluate.metrics import DRAWS
from ..evaluate.tasks import TEMPLATE, Kind, Task, list_tasks, load_task
from ..model.clip import HLIPModel
from ..model.memory import keep_memory
from ..output import check_folder, new_figure, table
from ..prepare.discover import find_studies
from ..prepare.studies import load_study
from ..processes import Processes
from ..read.files import near
from ..read.scan import Rejection, ScanError
from ..store.store import Store
from ..study import Study
from ..terminal import say
from ..train.plot import FORMATS

Model = TypeVar("Model", HLIPModel, SliceEncoder)
FILES_HELP = "image files, which together are one study; or folders, each of which holds the scans of one study"
EMBEDDINGS, SIMILARITIES = "embeddings.npz", "similarities.npz"  # what commands that make them by the way call them
SOME_LEFT_OUT = 3
SHARE = "share_among_these_prompts"  # in JSON
# What is said of a task's classes, by its kind.
SAID = {
    "multi-class": "share among these prompts, and cosine",
    "pairs": "share beside the negative prompt, and cosine",
    "similarity": "cosine",
}
Said = dict[str, tuple[float | None, float | None]]  # share and cosine by class


MODEL_HELP = "a saved or released model: its folder, its file, or its name on the hub"
DEVICE = argument(
    "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)"
)
MODEL = (argument("--model", required=True, help=MODEL_HELP), DEVICE)
ENCODER = (  # for `load_encoder`
    argument(
        "--model",
        required=True,
        help=f"{MODEL_HELP}; or a 2D model in open_clip's format: {PREFIX}FOLDER, {PREFIX}{HUB}OWNER/NAME",
    ),
    DEVICE,
    argument("--pool", choices=get_args(Pool), help="of a 2D model: how its slices become a study (default: mean)"),
    argument(
        "--slices",
        type=Path,
        metavar="JSON",
        help="of a 2D model: the slices to see, {study: {scan: [index, ...]}}; studies that are not listed are seen "
        "whole",
    ),
)
FIGURES = (  # how figures are made of embeddings and labels
    argument("--head", type=int, metavar="N", help="which of the model's embeddings, if it gives several of a study"),
    argument(
        "--draws",
        type=at_least(1),
        default=DRAWS,
        metavar="N",
        help="how often studies are drawn anew, for intervals (default: %(default)s)",
    ),
    argument("--seed", type=int, default=0, help="of all that is drawn at random (default: %(default)s)"),
)
TEMPLATES = argument("--templates", metavar="NAME", help="which of the task's templates (default: its first)")
RESULTS = argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write into")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None] | None,
    summary: str,
    description: str,
    arguments: Iterable[Argument | OneOf] = (),
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command to subparsers; `run` gives its exit status. Description and epilog are shown line by line."""
    raw = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=raw)
    command.set_defaults(run=run)
    add_arguments(command, arguments)
    return command


def load_model(args: argparse.Namespace) -> HLIPModel:
    """The model of `--model` on `--device`, in evaluation mode."""
    if args.model.startswith(PREFIX):
        raise ValueError(f"--model {args.model}: hlip {args.command} takes no 2D models")
    return _on_device(HLIPModel.from_pretrained(args.model), args.device)


def load_encoder(args: argparse.Namespace) -> HLIPModel | SliceEncoder:
    """As `load_model`, or a 2D model."""
    if args.model.startswith(PREFIX):
        slices = read_slices(args.slices) if args.slices else None
        return _on_device(SliceEncoder.from_pretrained(args.model, args.pool or "mean", slices), args.device)
    if args.slices or args.pool:
        raise ValueError(f"--pool and --slices are for 2D models: --model {PREFIX}FOLDER")
    return load_model(args)


def _on_device(model: Model, device: str) -> Model:
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device.startswith("cpu"):
        keep_memory()
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: cannot be used ({str(error).splitlines()[0]})") from error


def embedding_arguments() -> tuple[Argument, ...]:
    """Arguments that say how studies are embedded."""
    processors = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return (
        field_argument(Options, "max_tokens", metavar="N"),
        field_argument(Options, "dtype"),
        argument(
            "--workers",
            type=at_least(0),
            default=min(4, max(1, processors - 1)),
            metavar="N",
            help="processes that read studies while the model runs; 0 for none (default: %(default)s)",
        ),
        field_argument(Options, "one_scan", metavar="SEED"),
    )


def check_results(folder: Path) -> None:
    """Raise ImportError or ValueError now, not after hours, where results with plots could not be written."""
    new_figure(1, 1)
    check_folder(folder)


def prompt_arguments(prompt: str) -> tuple[Argument, ...]:
    """Arguments for the prompts that studies are compared with.

    prompt: the help of `--prompt`.
    """
    tasks = ", ".join(list_tasks())
    return (
        argument("--prompt", action="append", default=[], metavar="TEXT", help=prompt),
        argument(
            "--template",
            action="append",
            default=[],
            metavar="TEXT",
            help=f"sentence with {{}} for the prompt; repeat to average over several (default: {TEMPLATE!r})",
        ),
        argument(
            "--prompts",
            metavar="TASK",
            help=f"classes and templates, in place of both: {tasks}, or FILE.yaml (see hlip eval --help)",
        ),
        TEMPLATES,
    )


def read_prompts(args: argparse.Namespace, texts: Sequence[str]) -> Task:
    """The task of `--prompts`; or else one of texts, in the templates of `--template`."""
    if args.prompts:
        if args.prompt or args.template:
            raise ValueError("give --prompts, or --prompt and --template, not both")
        return load_task(args.prompts)
    kind: Kind = "multi-class" if len(texts) > 1 else "similarity"
    return Task({text: text for text in texts}, args.template or TEMPLATE, kind)


def said_of(task: Task, similarities: np.ndarray, scale: float) -> Said:
    """What a task says of a study: (T) similarities to the share and the cosine of every class, if it has them."""
    shares: dict[str, float] = {}
    if task.kind != "similarity":
        shares = dict(zip(task.names, task.scores(similarities[None], scale)[0].tolist(), strict=True))
    cosines = dict(zip(task.classes, similarities.tolist(), strict=False))  # those of negative prompts are behind
    return {name: (shares.get(name), cosines.get(name)) for name in {**shares, **cosines}}


def said_lines(task: Task, said: Said) -> list[str]:
    """The same, to be printed."""
    return [f"  {SAID[task.kind]}", *bars((name, *pair) for name, pair in said.items())]


def as_json(said: Said) -> dict[str, dict[str, float]]:
    """Shares, and cosines, by class."""
    columns = zip(*said.values(), strict=True) if said else ((), ())
    return {
        key: {name: round(value, 6) for name, value in zip(said, column, strict=True) if value is not None}
        for key, column in zip((SHARE, "cosine"), columns, strict=True)
    }


def bars(rows: Iterable[tuple[str, float | None, float | None]]) -> list[str]:
    """Lines of a name, a share, another figure and a bar; those with the largest share first."""
    ordered = sorted(rows, key=lambda row: (row[1] is None, -(row[1] or 0.0), -(row[2] or 0.0)))
    cells = [
        (
            f"  {name}",
            "" if share is None else f"{share:6.1%}",
            "" if figure is None else f"{figure:6.3f}",
            "#" * round(40 * (share or 0.0)),
        )
        for name, share, figure in ordered
    ]
    return table(zip(*(column for column in zip(*cells, strict=True) if any(column)), strict=True))


def open_studies(paths: Sequence[Path], model: HLIPModel | SliceEncoder) -> Studies:
    """A store; or, but not for 2D models, a study list, or what `study_paths` takes."""
    if len(paths) == 1 and (paths[0] / "shards").is_dir():
        store = Store(paths[0])
        if isinstance(model, HLIPModel):
            say(*unlike(model.config.recipe, store), file=sys.stderr)
            return StoreStudies(store, model.config.vision.patch_size)
        model.check_slices(store)
        return StoreStudies(store)
    if not isinstance(model, HLIPModel):
        raise ValueError(
            f"{paths[0]}: no store; a 2D model does not say how scans are prepared: hlip prepare does that"
        )
    if len(paths) == 1 and paths[0].suffix.lower() in (".json", ".csv") and not paths[0].is_dir():
        return ListedStudies(find_studies(paths[0], progress=tqdm), model.config.preprocess)
    if stores := [path for path in paths if (path / "shards").is_dir()]:
        raise ValueError(f"{stores[0]} is a store: give it alone")
    return FileStudies(study_paths(list(paths)), model.config.preprocess)


def embedding_options(args: argparse.Namespace, unit: Unit = "study") -> Options:
    """Make options from the arguments of `embedding_arguments`.

    Raises:
        ValueError: arguments that do not go together.
    """
    if args.slices and args.one_scan is not None:
        raise ValueError("--slices does not go with --one_scan: it says what to see")
    if args.slices and unit != "study":
        raise ValueError("--slices does not go with scans embedded by themselves: it says what to see of a study")
    if unit == "both" and args.one_scan is not None:
        raise ValueError("--scans embeds every scan, --one_scan sees only one: give one of them")
    return Options(unit, args.max_tokens, args.dtype, args.one_scan)


@contextlib.contextmanager
def keeping_parts(out: Path) -> Iterator[None]:
    """Where a job that writes `out` is interrupted, say that what is finished stays beside it."""
    try:
        yield
    except KeyboardInterrupt:
        if not parts_of(out).exists():
            raise
        raise KeyboardInterrupt(f"{parts_of(out)} keeps what is finished: run this again to go on") from None


def embeddings_of(
    args: argparse.Namespace,
    model: HLIPModel | SliceEncoder,
    studies: Studies | None,
    options: Options,
    among: Processes,
    prompts: Sequence[Sequence[str]] | None = None,
) -> Embeddings | None:
    """Read the file of `--embeddings`; or else make the embeddings of studies, or with prompts their similarities to
    these, which are kept in the folder of `--out`. None on all processes but the first.

    Raises:
        ValueError: not a file that `hlip embed` wrote, or it says that another model made it.
    """
    if studies is not None:
        out = args.out / (EMBEDDINGS if prompts is None else SIMILARITIES)
        with keeping_parts(out):
            return embed(model, studies, options, out, args.workers, among, prompts)
    if not among.first:
        return None
    made = Embeddings.read(args.embeddings)
    made_by = made.facts.get("job", {}).get("model")
    if made_by is not None and made_by != model_digest(model):
        raise ValueError(f"{args.embeddings}: made by another model than --model, or with other --pool or --slices")
    return made


def bar(unit: str, description: str | None = None) -> Any:
    """tqdm for units, on a terminal."""
    return functools.partial(tqdm, desc=description, unit=unit, disable=None)


def report_failed(made: Embeddings, command: str) -> int:
    """Say which studies and scans were left out; the exit status."""
    lost = list(made.facts.get("failed", ()))
    lost += [(f"{uid}, scan {scan}", f"{rule}: {reason}") for uid, scan, rule, reason in made.facts.get("left_out", ())]
    for what, reason in lost[:SHOWN]:
        say(f"hlip {command}: left out {what}: {reason}", file=sys.stderr)
    if len(lost) > SHOWN:
        say(f"hlip {command}: left out {len(lost) - SHOWN} more", file=sys.stderr)
    return SOME_LEFT_OUT if lost else 0


def rejections(left_out: Iterable[Rejection]) -> list[dict[str, str]]:
    """Scans of one study that were left out, for JSON, in the words of a store's rejected.jsonl."""
    return [{"scan": scan.scan, "rule": scan.rule, "reason": scan.reason} for scan in left_out]


def rejected_lines(left_out: Iterable[Mapping[str, str]]) -> list[str]:
    """The same, to be printed."""
    return [f"  left out: {scan['scan']} ({scan['rule']}: {scan['reason']})" for scan in left_out]


def report_unjoined(what: str, uids: Sequence[str]) -> None:
    """Say how many studies are, as "without report", and name the first."""
    if uids:
        more = ", ..." if len(uids) > SHOWN else ""
        say(f"studies {what}: {len(uids)} ({', '.join(uids[:SHOWN])}{more})", file=sys.stderr)


def picture_format(path: Path) -> str:
    """What the name's ending says: "png", "pdf" or "svg". Raises ValueError at any other."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    return path.suffix[1:]


def study_paths(files: list[Path]) -> list[Path | list[Path]]:
    """One entry per study: a folder each, or all the files together."""
    if len(set(files)) < len(files):
        raise ValueError(f"{max(files, key=files.count)} is given twice")
    if missing := [path for path in files if not os.path.lexists(path)]:
        raise ValueError(f"{missing[0]}: no such file or folder{near(missing[0])}")
    folders = [path for path in files if path.is_dir()]
    if folders and len(folders) < len(files):
        other = next(path for path in files if not path.is_dir())
        raise ValueError(f"{other} is not a folder but {folders[0]} is: give the files of one study, or folders")
    return list(folders) if folders else [files]


def load_studies(groups: list[Path | list[Path]], model: HLIPModel, failed: dict[str, ScanError]) -> Iterator[Study]:
    """Read studies one by one. Among several, a folder of which no scan can be used is put into `failed`.

    Raises:
        ScanError: a scan that was given by its file cannot be used, or none of the only folder, or of all.
    """
    names = zip(groups, study_names(groups), strict=True)
    for paths, name in tqdm(names, "reading studies", len(groups), unit="study", disable=len(groups) == 1 or None):
        try:
            study = load_study(paths, model.config.preprocess, uid=name)
        except ScanError as error:
            failed[name] = error
            if isinstance(paths, list) or len(failed) == len(groups):
                raise
        else:
            yield study
