"""What commands have in common: the model, studies from files, and outputs written whole."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, get_args

import torch
from tqdm import tqdm

from ..embed.baselines import HUB, PREFIX, Pool, SliceEncoder, read_slices
from ..embed.encoders import model_digest
from ..embed.inputs import FileStudies, ListedStudies, StoreStudies, Studies, study_names
from ..embed.loop import MAX_TOKENS, Dtype, Options, Unit, parts_of
from ..embed.table import Embeddings
from ..model.clip import HLIPModel
from ..model.memory import keep_memory
from ..prepare.studies import load_study
from ..read.files import near
from ..read.scan import Rejection, ScanError
from ..store.store import Store
from ..study import Study
from ..terminal import say
from ..train.plot import FORMATS

Model = TypeVar("Model", HLIPModel, SliceEncoder)
FILES_HELP = "image files, which together are one study; or folders, each of which holds the scans of one study"
EMBEDDINGS = "embeddings.npz"  # what commands that make embeddings by the way call them
SOME_LEFT_OUT = 3
SHARE = "share_among_these_prompts"  # in JSON
SHOWN = 10  # lines of a list that are printed


def add_model(command: argparse.ArgumentParser, of_slices: bool = False) -> None:
    """Add `--model` and `--device`; with `of_slices` also what 2D models need, for `load_encoder`."""
    also = f"; or a 2D model in open_clip's format: {PREFIX}FOLDER, {PREFIX}{HUB}OWNER/NAME" if of_slices else ""
    command.add_argument(
        "--model", required=True, help=f"a saved or released model: its folder, its file, or its name on the hub{also}"
    )
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)"
    )
    if of_slices:
        command.add_argument(
            "--pool", choices=get_args(Pool), help="of a 2D model: how its slices become a study (default: mean)"
        )
        command.add_argument(
            "--slices",
            type=Path,
            metavar="JSON",
            help="of a 2D model: the slices to see, {study: {scan: [index, ...]}}; studies that are not listed are "
            "seen whole",
        )


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


def add_embedding(command: argparse.ArgumentParser) -> None:
    """Add what says how studies are embedded."""
    command.add_argument(
        "--max_tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="studies run together up to so many patch tokens; more is faster on GPUs and needs more memory "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--dtype",
        choices=get_args(Dtype),
        default="auto",
        help="type of matrix products (default: bf16 on GPUs, and on CPUs with instructions for it; otherwise fp32)",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=min(4, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)),
        metavar="N",
        help="processes that read studies while the model runs; 0 for none (default: %(default)s)",
    )
    command.add_argument(
        "--one_scan",
        type=int,
        metavar="SEED",
        help="show the model one scan of each study, drawn at random: the baseline of one scan a study",
    )


def open_studies(paths: Sequence[Path], model: HLIPModel | SliceEncoder) -> Studies:
    """A store; or, but not for 2D models, a study list, or what `study_paths` takes."""
    if len(paths) == 1 and (paths[0] / "shards").is_dir():
        store = Store(paths[0])
        if isinstance(model, HLIPModel):
            return StoreStudies(store, model.config.vision.patch_size)
        model.check_slices(store)
        return StoreStudies(store)
    if not isinstance(model, HLIPModel):
        raise ValueError(
            f"{paths[0]}: no store; a 2D model does not say how scans are prepared: hlip prepare does that"
        )
    if len(paths) == 1 and paths[0].suffix.lower() in (".json", ".csv") and not paths[0].is_dir():
        from ..prepare.discover import find_studies

        return ListedStudies(find_studies(paths[0], progress=tqdm), model.config.preprocess)
    if stores := [path for path in paths if (path / "shards").is_dir()]:
        raise ValueError(f"{stores[0]} is a store: give it alone")
    return FileStudies(study_paths(list(paths)), model.config.preprocess)


def embedding_options(args: argparse.Namespace, unit: Unit = "study") -> Options:
    """Of the arguments of `add_embedding`.

    Raises:
        ValueError: arguments that do not go together, or out of range.
    """
    if args.workers < 0:
        raise ValueError(f"--workers: expected 0 or more, got {args.workers}")
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


def read_embeddings(path: Path, model: HLIPModel | SliceEncoder) -> Embeddings:
    """Read what `hlip embed` wrote.

    Raises:
        ValueError: not such a file, or it says that another model made it.
    """
    table = Embeddings.read(path)
    made_by = table.facts.get("job", {}).get("model")
    if made_by is not None and made_by != model_digest(model):
        raise ValueError(f"{path}: made by another model than --model, or with other --pool or --slices")
    return table


def report_failed(table: Embeddings, command: str) -> int:
    """Say which studies and scans were left out; the exit status."""
    lost = [(uid, reason) for uid, reason in table.facts.get("failed", ())]
    lost += [
        (f"{uid}, scan {scan}", f"{rule}: {reason}") for uid, scan, rule, reason in table.facts.get("left_out", ())
    ]
    for what, reason in lost[:SHOWN]:
        say(f"hlip {command}: left out {what}: {reason}", file=sys.stderr)
    if len(lost) > SHOWN:
        say(f"hlip {command}: left out {len(lost) - SHOWN} more", file=sys.stderr)
    return SOME_LEFT_OUT if lost else 0


def rejections(left_out: Iterable[Rejection]) -> list[dict[str, str]]:
    """Scans of one study that were left out, for JSON, in the words of a store's rejected.jsonl."""
    return [{"scan": each.scan, "rule": each.rule, "reason": each.reason} for each in left_out]


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
            continue
        yield study
