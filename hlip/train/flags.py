"""The flags of the released training programs, and what they are here."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from ..model.config import CXR_BERT
from ..read.safe import short

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Flag:
    """Answer to a flag of the release.

    setting: has the same meaning here, and takes the flag's value.
    cases: the settings that a value stands for, in place of that one; the value "" is that of a flag without any.
    note: a line for the log; of a flag that is refused, what to do instead.
    refused: values that are not among `cases` are an error.
    """

    setting: str = ""
    cases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    note: str = ""
    refused: bool = False

    def settings(self, name: str, value: str) -> Mapping[str, str]:
        """The settings that the flag stands for. Raises ValueError where it is refused; says what to do."""
        if value in self.cases:
            return self.cases[value]
        if self.refused:
            raise ValueError(f"--{name}{' ' + value if self.cases else ''}: {self.note}")
        return {self.setting: value} if self.setting else {}


def _ignored(reason: str, *names: str) -> dict[str, Flag]:
    return dict.fromkeys(names, Flag(note=f"left aside: {reason}"))


def _refused(advice: str, *names: str) -> dict[str, Flag]:
    return dict.fromkeys(names, Flag(note=advice, refused=True))


_DEFAULTS = (
    "flags that are not given have this library's defaults; what the release does without a flag (MAE weights, eps "
    "1e-6, beta2 0.98, no limit to the gradient, items in random order) is in the model's recipe: --config NAME"
)
_IMAGES = "it is for data sets of 2D images; scans come from a store, as its recipe made them"
_STUDIES = "hlip prepare makes a store of {}; give that as --{} STORE"
_TESTED = "hlip prepare makes a store of that set; give --val STORE --labels FILE --prompts {}"
_EPOCHS = "it counts epochs; {} comes every --{} steps here, and an epoch has studies / batch_size of them"
_CHEST = Flag(
    cases={"-1150 350 crop": {}}, refused=True,
    note="the store's recipe says it: hlip prepare --recipe chest-ct is -1150 350 crop; others are recipes of your own",
)  # fmt: skip
_REPORTS = {"prefix": "This study shows: "}  # of 2026-04, on CT-RATE; then on MR-RATE
_SECTIONS = {"findings": "findings", "prefix": "This study shows:", "findings_prefix": "This study looks like:"}
_JOINED = Flag()  # see `_joined`

# The flags of the releases of 2025-06, 2025-10 and 2026-04, and of the ablations' branch.
FLAGS: dict[str, Flag] = {
    "device": Flag("device"),
    "epochs": Flag("epochs"),
    "eps": Flag("eps"),
    "finetune": Flag("init"),
    "force-patch-dropout": Flag("patch_dropout"),
    "grad-clip-norm": Flag("grad_clip"),
    "lock-text-unlocked-layers": Flag("unlocked_layers"),
    "log-every-n-steps": Flag("log_every"),
    "logs": Flag("out"),
    "logs-dir": Flag("out"),
    "lr": Flag("lr"),
    "model": Flag("model"),
    "num-scans": Flag("max_scans"),
    "precision": Flag(
        "precision",
        {"amp": {"precision": "fp16"}, "amp_bf16": {"precision": "bf16"}, "amp_bfloat16": {"precision": "bf16"}},
    ),
    "pretrained": Flag("init"),
    "resume": Flag("resume", {"latest": {"resume": "auto"}}),
    "seed": Flag("seed"),
    "text-process-cfg": Flag(
        cases={
            "report": {"texts": "items", **_REPORTS},
            "sentence": {"texts": "item", **_REPORTS},
            "sentence and report": {"texts": "item", "findings": "report", **_REPORTS},
            "sentence and findings": {"texts": "item", **_SECTIONS},
            "impressions and findings": {"texts": "items", **_SECTIONS},
        },
        note="--texts, --findings and --prefix say what a study is compared with; impressions alone need a store "
        "whose reports have no findings",
        refused=True,
    ),
    "train-data": Flag("data"),
    "val-data": Flag("val"),
    "valid-data": Flag("val"),
    "wandb-project-name": Flag("wandb"),
    "warmup": Flag("warmup"),
    "wd": Flag("weight_decay"),
    "workers": Flag("workers"),
    # Without a value.
    "delete-previous-checkpoint": Flag(cases={"": {"keep": "1"}}),
    "grad-checkpointing": Flag(cases={"": {"grad_checkpointing": "true"}}),
    "local-loss": Flag(cases={"": {"local_loss": "true"}}),
    "lock-text": Flag(cases={"": {"lock_text": "true", "locked_dropout": "true"}}),
    "torchcompile": Flag(cases={"": {"compile": "true"}}),
    "use-cxr-bert": Flag(cases={"": {"text": CXR_BERT}}),
    # Several of which make up one setting.
    **dict.fromkeys(
        [
            "accum-batch", "accum-freq", "batch-size", "beta1", "beta2", "lock-text-freeze-layer-norm", "name",
            "pretrained-image",
        ],
        _JOINED,
    ),
    # Of which one value is taken, or none is needed.
    "image-process-cfg": _CHEST,
    "input-info": _CHEST,
    "lr-scheduler": Flag(cases={"cosine": {}}, note="the rate follows a cosine after warm-up", refused=True),
    "opt": Flag(cases={"adamw": {}}, note="the optimizer is AdamW", refused=True),
    "save-frequency": Flag(note=_EPOCHS.format("a checkpoint", "save_every")),
    **dict.fromkeys(
        ["val-frequency", "valid-frequency", "zeroshot-frequency"],
        Flag(note=_EPOCHS.format("an evaluation", "eval_every")),
    ),
    "report-to": Flag(note="JSON lines and TensorBoard are always written; --wandb PROJECT for the rest"),
    "zeroshot-template": Flag(note="training takes the task's first templates; hlip eval --templates NAME others"),
    "gather-with-grad": Flag(note="gradients always reach the gathered embeddings"),
    "dist-backend": Flag(note="it is NCCL on GPUs and gloo on CPUs"),
    **_ignored(
        _IMAGES, "aug-cfg", "csv-caption-key", "csv-img-key", "csv-separator", "dataset-resampled", "dataset-type",
        "image-interpolation", "image-mean", "image-resize-mode", "image-std", "imagenet-v2", "imagenet-val",
        "train-data-upsampling-factors", "train-num-samples", "val-num-samples", "valid-num-samples",
    ),
    **_ignored("only the log differs", "debug", "log-local", "wandb-notes"),
    **_ignored("a run records its version", "copy-codebase"),
    **_ignored("copy --out yourself", "remote-sync", "remote-sync-frequency", "remote-sync-protocol"),
    **_ignored("the store says what it holds", "benchmark-type"),
    **_ignored("HF_HOME says where downloads lie", "cache-dir"),
    **_ignored("no model here is a CoCa", "coca-caption-loss-weight", "coca-contrastive-loss-weight"),
    **_ignored("torchrun sets it", "dist-url", "no-set-device-rank"),
    **_ignored("results do not depend on it", "ddp-static-graph", "loss-dist-impl"),
    **_ignored("models always have two towers", "force-custom-text"),
    **_ignored("no model here has batch norms", "lock-image-freeze-bn-stats", "use-bn-sync"),
    **_ignored("the optimizer is AdamW", "momentum"),
    **_ignored("the last checkpoint is always kept", "save-most-recent"),
    **_refused(_STUDIES.format("the scans of a folder", "data"), "data-root", "train-data-filelist"),
    **_refused(
        _STUDIES.format("scans and a list of studies", "data"), "json-root", "train-file", "train-scan-filedict"
    ),
    **_refused(_STUDIES.format("scans and --reports FILE", "data"), "train-report-filedict"),
    **_refused(
        _STUDIES.format("scans and a list of studies", "val"),
        "valid-data-filelist", "valid-file", "valid-report-filedict", "valid-scan-filedict",
    ),
    **_refused("a study is seen once in an epoch; hlip prepare makes a store of those you list", "train-uid-filedict"),
    **_refused(_TESTED.format("ct-rate"), "ct-rate", "zeroshot-ct-rate"),
    **_refused(_TESTED.format("rad-chestct"), "rad-chestct", "zeroshot-rad-chestct"),
    **_refused(_TESTED.format("TASK"), "ct", "mri"),
    **_refused("no model is distilled here; leave it out", "distill-model", "distill-pretrained"),
    **_refused(
        "the rate follows a cosine after warm-up; leave it out",
        "epochs-cooldown", "lr-cooldown-end", "lr-cooldown-power", "skip-scheduler",
    ),
    **_refused("the store's recipe gives the size, and positions follow it; leave it out", "force-image-size"),
    **_refused("models have the exact GELU; leave it out", "force-quick-gelu"),
    **_refused("torchrun starts several processes; leave it out", "horovod"),
    **_refused("the encoder is always trained; leave it out", "lock-image", "lock-image-unlocked-groups"),
    **_refused("in the release it trains no more than --lock-text does; give that", "lora-text"),
    **_refused("--compile compiles the encoder", "torchscript", "trace"),
    **_refused("layers are not quantised; --precision bf16 is the least", "use-bnb-linear"),
    **_refused("a model has its objective: --model siglip_vit_base_singlescan_h2_token2744", "siglip"),
}  # fmt: skip


def from_published_flags(arguments: list[str]) -> list[str]:
    """Put the released code's spelling of command-line arguments in ours, and underscores for hyphens. What is left
    aside is told on the log. `--steps` goes before a file's `epochs`, and the other way round.

    Raises:
        ValueError: a flag of theirs that has no counterpart here; says what to do.
    """
    bounds = [*(place for place, argument in enumerate(arguments) if argument.startswith("--")), len(arguments)]
    ours, given = arguments[: bounds[0]], dict[str, str]()
    for start, end in pairwise(bounds):
        name, sign, first = arguments[start][2:].partition("=")
        rest = arguments[start + 1 : end]
        flag, value = FLAGS.get(name), " ".join([first] * bool(sign) + rest)
        if flag is None or (value and "" in flag.cases):  # a setting of ours, as --grad-checkpointing false
            flag = Flag(name.replace("-", "_"))
        if flag.setting and value not in flag.cases:
            ours += [f"--{flag.setting}{sign}{first}", *rest]
            given[flag.setting] = value
        else:
            settings = flag.settings(name, value)
            ours += [f"--{setting}={chosen}" for setting, chosen in settings.items()]
            given |= settings
            if flag.note and not settings:
                _tell(f"--{name}: {flag.note}")
        given[name] = value
    if "batch-size" in given and "config" not in given:
        _tell(_DEFAULTS)
    settings = _joined(given)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in given and other not in given:
            settings[other] = "null"
    return ours + [f"--{setting}={chosen}" for setting, chosen in settings.items()]


def _joined(given: Mapping[str, str]) -> dict[str, str]:
    """The settings that follow from several flags together."""
    settings: dict[str, str] = {}
    if given.keys() & {"batch-size", "accum-batch", "accum-freq"}:
        settings["batch_size"] = _batch_size(given)
    if "batch-size" in given and "lr" in given and "lr_batch" not in given:
        settings["lr_batch"] = "null"  # the release never scales it
    if given.keys() & {"beta1", "beta2"}:
        settings["betas"] = f"[{given.get('beta1', '0.9')}, {given.get('beta2', '0.98')}]"
    if given.get("lock-text") == "" or "lock-text-freeze-layer-norm" in given:
        settings["train_norms"] = "false" if "lock-text-freeze-layer-norm" in given else "true"
    if "name" in given:
        settings["out"] = f"{given.get('out', 'logs')}/{given['name']}"
    if "pretrained-image" in given:
        size = "large" if "large" in given.get("model", "").lower() else "base"
        settings["vision"] = f"timm/vit_{size}_patch16_224.mae"
    return settings


def _batch_size(given: Mapping[str, str]) -> str:
    """The studies of a step over all processes. Raises ValueError where a number of them is not given, or is none."""
    own = "batch-size" if "batch-size" in given else "batch_size"
    factors = {name: given[name] for name in (own, "accum-batch", "accum-freq") if name in given}
    if own == "batch-size":
        factors["processes"] = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if own not in given:
        raise ValueError(
            f"--{min(factors)}: it multiplies --batch-size: give that, or a step's studies as --batch_size"
        )
    for name, number in factors.items():
        if not number.isdecimal():
            raise ValueError(f"--{name}: expected a whole number, got {short(number)}")
    product = math.prod(map(int, factors.values()))
    _tell(f"--batch_size {product}, the studies of a step: {' x '.join(f'{name} {n}' for name, n in factors.items())}")
    return str(product)


def _tell(line: str) -> None:
    """Log a line once, of all processes that torchrun or srun started."""
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")) == 0:
        log.warning("%s", line)
