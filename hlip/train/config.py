"""The settings of a training run, from a command line and the files that it names."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from ..objective import TextsName, Wording
from ..read.safe import check_finite, check_keys, hint, parse_yaml, read_yaml
from ..read.schema import check_ranges, structure
from ..terminal import say
from .flags import from_published_flags


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train a model on a store of studies (see `hlip prepare`).

    Args:
        data: store to train on.
        out: folder for the model, checkpoints and logs, which all processes must see.
        model: name of the model (`python -c "import hlip; print(hlip.list_models())"` lists them);
            clip_vit_base_scan_study_token1176 if neither this nor `init` says.
        text: folder or hub name of the BERT; the model's own if not given.
        vision: 2D ViT for the encoder to begin with: a file, folder or hub name.
        init: model to begin with, in any layout: a folder, a training checkpoint, or a hub name.
        lock_text: keep the text tower fixed but for its projection; the model's own choice if not given.
        unlocked_layers: the last n of a locked text tower's embeddings and layers are trained.
        train_norms: train the LayerNorms of a locked text tower; the model's own choice if not given.
        locked_dropout: leave the dropout of a locked text tower on; the model's own choice if not given.
        patch_dropout: share of the patches that are left out in training; the model's own if not given.
        drop_path: rate of stochastic depth in the last block, rising to it from 0; the model's own if not given.
        val: store to evaluate on by zero-shot classification; needs `prompts`.
        labels: CSV with a column `study` and one of 0 and 1 per class; the labels in the store if not given.
        prompts: a benchmark's name, or a YAML file with each class's prompts, and templates.
        device: "cpu" or "cuda"; "auto" takes GPUs if there are any.
        fsdp: shard weights, gradients and optimizer over the processes, for large models.
        compile: compile the encoder with torch.compile.
        grad_checkpointing: run the encoder's blocks again in backward, to keep less.
        resume: go on from the last checkpoint in `out`; "auto" does if there is one.
        epochs: passes over the data.
        steps: optimizer steps of the run, in place of `epochs`; 17000 if neither is given.
        batch_size: studies of a step, over all processes.
        micro_tokens: patch tokens that a process encodes at once; a step's share beyond that is run in pieces, with
            the gradient of the whole. All at once if not given.
        balance: "studies" gives each process as many studies, of nearly the same work; "cost" the same work, whatever
            number of studies that is.
        max_scans: draw at most this many scans of a study at each step: 10 as published, 1 for the baseline that sees
            one random scan a study, null for all scans.
        scan_positions: draw positions of scans for every study, or once for all that a process encodes at once.
        texts: what of a report a study is compared with: all of it; its sentences in random order; one sentence; one
            item, which is a paragraph or a list's item; all items in random order. Of the objective "dual" the
            impression is treated so.
        findings: what the second embedding of the objective "dual" is compared with: the findings, as they are; or the
            whole report, its pieces in random order, of which the first text is made then, too.
        sentence_dropout: share of sentences or items left out at random, of reports that have more than one.
        prefix: text in front of every report.
        findings_prefix: of the objective "dual", the one in front of findings; `prefix` if not given.
        local_loss: each process compares its own studies with all; less memory with many processes.
        lr: peak learning rate, after warm-up.
        lr_batch: studies of a step that lr is meant for; it is scaled in proportion to batch_size. Not scaled if not
            given.
        warmup: steps of linear warm-up; a cosine to zero follows.
        betas: of AdamW.
        eps: of AdamW, beside the root of the second moment; 1e-6 in the released code.
        weight_decay: of AdamW, on matrices only.
        grad_clip: largest norm of the gradient; 0 for any.
        precision: of products; weights and optimizer are fp32 in any case.
        workers: processes that read data, per rank.
        log_every: steps between two lines of the log.
        eval_every: steps between two evaluations; 0 for one at the end.
        save_every: steps between two checkpoints; 0 for one at the end.
        save_minutes: also save when so many minutes have passed since the last checkpoint.
        keep: checkpoints that are kept, the latest.
        stall_minutes: a run ends when a process has been busy with one step for so long; 0 for never.
        wandb: also log to Weights & Biases, under this project.
        seed: everything random follows from it.
    """

    data: Path
    out: Path = Path("runs/pretrain")
    model: str | None = None
    text: str | None = None
    vision: str | None = None
    init: str | None = None
    lock_text: bool | None = None
    unlocked_layers: int = 0
    train_norms: bool | None = None
    locked_dropout: bool | None = None
    patch_dropout: float | None = None
    drop_path: float | None = None
    val: Path | None = None
    labels: Path | None = None
    prompts: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fsdp: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    resume: Literal["auto", "true", "false"] = "false"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 256
    micro_tokens: int | None = None
    balance: Literal["studies", "cost"] = "studies"
    max_scans: int | None = 10
    scan_positions: Literal["study", "batch"] = "study"
    texts: TextsName = "report"
    findings: Literal["findings", "report"] = "findings"
    sentence_dropout: float = 0.0
    prefix: str = ""
    findings_prefix: str | None = None
    local_loss: bool = False
    lr: float = 2e-4
    lr_batch: int | None = None
    warmup: int = 2000
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.2
    grad_clip: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    workers: int = 4
    log_every: int = 10
    eval_every: int = 1000
    save_every: int = 1000
    save_minutes: float | None = None
    keep: int = 2
    stall_minutes: float = 30.0
    wandb: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_finite(self)
        check_ranges(self, FIELDS_IN)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps {self.steps} and epochs {self.epochs} are both given: one of them ends the run")
        if self.init is not None and self.vision is not None:
            raise ValueError(
                f"init {self.init} and vision {self.vision} are both given: one of them says what weights to begin with"
            )
        if (self.val is None) != (self.prompts is None) or (self.labels is not None and self.val is None):
            raise ValueError(f"evaluation needs both val and prompts, got val {self.val}, prompts {self.prompts}")
        if self.fsdp and self.balance == "cost":
            raise ValueError("fsdp needs balance 'studies': its processes must run as many pieces as one another")

    @property
    def wording(self) -> Wording:
        return Wording(**{field.name: getattr(self, field.name) for field in fields(Wording)})


FIELDS_IN = {
    "at least 1": ("batch_size", "log_every", "keep"),
    "above 0": ("steps", "epochs", "lr", "eps", "lr_batch", "max_scans", "micro_tokens", "save_minutes"),
    "0 or more": (
        "warmup", "weight_decay", "seed", "unlocked_layers", "eval_every", "save_every", "stall_minutes", "grad_clip",
        "workers",
    ),
    "in [0, 1)": ("sentence_dropout", "patch_dropout", "drop_path", "betas"),
}  # fmt: skip
# What may differ between a run and its continuation.
FREE = frozenset(
    ["data", "out", "device", "compile", "grad_checkpointing", "fsdp", "resume", "init", "vision", "local_loss",
     "workers", "micro_tokens", "balance", "log_every", "eval_every", "save_every", "save_minutes", "keep",
     "stall_minutes", "wandb", "val", "labels", "prompts"]
)  # fmt: skip


KINDS: dict[str, Any] = get_type_hints(TrainConfig)
DEFAULTS = {field.name: field.default for field in fields(TrainConfig)}
RECIPES = Path(__file__).with_name("recipes")
RECIPE_FOLDERS = Path(), Path("recipes"), Path("train/recipes")
MOST_VALUE = 4096  # characters, as a path may have


class Parser(argparse.ArgumentParser):
    """Every field of `TrainConfig` is a flag, and `--config` reads a file of them. All are kept as texts, in the order
    in which they are given."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._add(self, "config", "FILE", "YAML file with any of the settings below, or the name of a published recipe")
        self.add_argument("--print_config", action="store_true", help="print all settings as a file of them, and end")
        summary, _, rest = (TrainConfig.__doc__ or "").partition("\n")
        group = self.add_argument_group(summary.rstrip("."))
        told = dict(re.findall(r"^ {8}(\w+): ((?:.|\n {9})+)", rest, re.MULTILINE))
        for field in fields(TrainConfig):
            default = "required" if field.default is MISSING else f"default: {plain(field.default)}"
            text = f"{told[field.name]} ({field.type}, {default})".replace("None", "null").replace("%", "%%")
            self._add(group, field.name, _choices(KINDS[field.name]), text)

    def _add(self, group: argparse._ActionsContainer, name: str, metavar: str | None, text: str) -> None:
        group.add_argument(
            f"--{name}", dest="given", action="append", type=lambda value: (name, value), default=[],
            metavar=metavar or name.upper(), help=text,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help explains every setting)")


def _choices(kind: Any) -> str | None:
    """The values that can be chosen from, as help shows them."""
    words = get_args(kind) if get_origin(kind) is Literal else ()
    if bool in (kind, *get_args(kind)):
        words = ("true", "false", "null") if kind is not bool else ("true", "false")
    return f"{{{','.join(words)}}}" if words else None


def read_arguments(arguments: list[str], prog: str, description: str) -> TrainConfig:
    """Read the settings of a command line and of the files that it names. Of a setting given twice the later counts.

    Raises:
        ValueError: an unknown setting, or a value that it cannot have; names it, and the file that it stands in.
    """
    parser = Parser(prog, description)
    args, unknown = parser.parse_known_args(from_published_flags(arguments))
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint(name, KINDS, ())}")
    settings: dict[str, Any] = {}
    files: dict[str, Path] = {}  # the file that a setting stands in
    for name, text in args.given:
        if name == "config":
            path = find_settings(text)
            content = read_settings(path)
            files |= dict.fromkeys(content, path)
        else:
            content = {name: value_of(name, text)}
            files.pop(name, None)
        settings |= content
    if args.print_config:
        shown = {name: None if value is MISSING else plain(value) for name, value in (DEFAULTS | settings).items()}
        say(*yaml.safe_dump(shown, sort_keys=False).splitlines())
        parser.exit()
    if "data" not in settings:
        parser.error("data: is missing; give --data")
    try:
        return TrainConfig(**settings)
    except ValueError as error:
        name = str(error).partition(" ")[0]
        raise ValueError(f"{files[name]}: {error}" if name in files else str(error)) from error


def find_settings(given: str) -> Path:
    """The file that is meant: a path, or a published recipe, as NAME, NAME.yaml or train/recipes/NAME.yaml."""
    path = Path(given)
    if path.exists():
        return path
    recipe = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent in RECIPE_FOLDERS and recipe.is_file():
        return recipe
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ValueError(f"--config {given}: no such file or recipe{hint(path.stem, names)}")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, as they would be typed."""
    try:
        content = read_yaml(path, texts=True)
        if not isinstance(content, dict):
            raise ValueError(f"expected settings by name, got {type(content).__name__}")
        check_keys(content, KINDS)
        return {name: value_of(name, value) for name, value in content.items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path}: not readable settings ({error})") from error


def value_of(name: str, given: Any) -> Any:
    """The value of a setting that is typed as a text, or stands in a file as a text, null, or a list of texts.

    Raises:
        ValueError: longer than any may be, or not what the setting takes; names it.
    """
    kind = KINDS[name]
    kinds = get_args(kind) or (kind,)
    value = given
    try:
        if len(given or "") > MOST_VALUE:
            raise ValueError(f"a value of length {len(given)} (at most {MOST_VALUE})")
        if isinstance(given, list):
            value = [parse_yaml(item) if isinstance(item, str) else item for item in given]
        elif isinstance(given, str) and not {str, Path} & set(kinds):
            value = parse_yaml(given)
        elif given == "null" and type(None) in kinds:
            value = None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if get_origin(kind) is Literal:
        value = str(value).lower() if isinstance(value, bool) else given
    return structure(kind, value, name)


def plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
