"""What a training run is told: every field is a flag of `train/pretrain.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ..read.safe import check_finite

Texts = Literal["report", "shuffled", "sentence"]

# Flags of the released training code that mean the same here.
PUBLISHED_FLAGS = {
    "epochs": "epochs",
    "force-patch-dropout": "patch_dropout",
    "grad-checkpointing": "grad_checkpointing",
    "grad-clip-norm": "grad_clip",
    "local-loss": "local_loss",
    "lock-text": "lock_text",
    "lock-text-unlocked-layers": "unlocked_layers",
    "log-every-n-steps": "log_every",
    "logs": "out",
    "logs-dir": "out",
    "lr": "lr",
    "model": "model",
    "num-scans": "max_scans",
    "precision": "precision",
    "pretrained": "init",
    "seed": "seed",
    "torchcompile": "compile",
    "train-data": "data",
    "val-data": "val",
    "valid-data": "val",
    "wandb-project-name": "wandb",
    "warmup": "warmup",
    "wd": "weight_decay",
    "workers": "workers",
}


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
        unlocked_layers: of a locked text tower, the last so many layers are trained.
        patch_dropout: share of the patches that are left out in training; the model's own if not given.
        drop_path: rate of stochastic depth in the last block, rising to it from 0; the model's own if not given.
        val: store to evaluate on by zero-shot classification; needs `prompts`.
        labels: CSV with a column `study` and one of 0 and 1 per class; the labels in the store if not given.
        prompts: YAML with each class's names, and templates.
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
        texts: what of a report a study is compared with: all of it; its sentences in random order; one sentence. Of the
            objective "dual" the impression is treated so, findings are whole.
        sentence_dropout: share of sentences left out at random, of reports that have more than one.
        local_loss: each process compares its own studies with all; less memory with many processes.
        lr: peak learning rate, after warm-up.
        lr_batch: studies of a step that lr is meant for; it is scaled in proportion to batch_size. Not scaled if not
            given.
        warmup: steps of linear warm-up; a cosine to zero follows.
        betas: of AdamW.
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
    patch_dropout: float | None = None
    drop_path: float | None = None
    val: Path | None = None
    labels: Path | None = None
    prompts: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fsdp: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    resume: Literal["auto", "true", "false"] | bool = "false"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 256
    micro_tokens: int | None = None
    balance: Literal["studies", "cost"] = "studies"
    max_scans: int | None = 10
    texts: Texts = "report"
    sentence_dropout: float = 0.0
    local_loss: bool = False
    lr: float = 2e-4
    lr_batch: int | None = None
    warmup: int = 2000
    betas: tuple[float, float] = (0.9, 0.95)
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
        for name in ("batch_size", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "epochs", "lr", "lr_batch", "max_scans", "micro_tokens", "save_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("warmup", "weight_decay", "seed", "unlocked_layers", "eval_every", "save_every", *LIMITS):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("sentence_dropout", "patch_dropout", "drop_path"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
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


LIMITS = ("stall_minutes", "grad_clip", "workers")
# What may differ between a run and its continuation.
FREE = frozenset(
    ["data", "out", "device", "compile", "grad_checkpointing", "fsdp", "resume", "init", "vision", "local_loss",
     "workers", "micro_tokens", "balance", "log_every", "eval_every", "save_every", "save_minutes", "keep",
     "stall_minutes", "wandb", "val", "labels", "prompts"]
)  # fmt: skip


def from_published_flags(arguments: list[str]) -> list[str]:
    """Command-line arguments with the released code's spelling put in ours. `--steps` goes before a file's `epochs`,
    and the other way round.

    Raises:
        ValueError: a flag of theirs that has no counterpart here; says what to do.
    """
    own = {each.name for each in fields(TrainConfig)}
    found: list[str] = []
    flag, given = "", set()
    for argument in arguments:
        if not argument.startswith("--"):
            found.append(_VALUES.get(flag, {}).get(argument, argument))
            continue
        name, sign, value = argument[2:].partition("=")
        if name in _INSTEAD and name not in own:
            raise ValueError(f"--{name}: {_INSTEAD[name]}")
        flag = name if name in own else PUBLISHED_FLAGS.get(name, name)
        given.add(flag)
        if not sign and flag != name and flag in ("grad_checkpointing", "local_loss", "lock_text", "compile"):
            sign, value = "=", "true"
        found.append(f"--{flag}{sign}{_VALUES.get(flag, {}).get(value, value)}")
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in given and other not in given:
            found.append(f"--{other}=null")
    return found


# Values of theirs that have another name here.
_VALUES = {
    "precision": {"amp": "fp16", "amp_bf16": "bf16", "amp_bfloat16": "bf16"},
    "resume": {"latest": "auto"},
}
_INSTEAD = {
    "accum-freq": "a step is cut into pieces by --micro_tokens, with the gradient of the whole",
    "batch-size": "it counts the studies of one GPU there; --batch_size counts those of all processes",
    "beta1": "both betas are given as --betas '[0.9, 0.95]'",
    "beta2": "both betas are given as --betas '[0.9, 0.95]'",
    "dist-backend": "it is NCCL on GPUs and gloo on CPUs",
    "eps": "it is 1e-8",
    "gather-with-grad": "gradients always reach the gathered embeddings; leave it out",
    "name": "--out is the run's folder",
    "report-to": "JSON lines and TensorBoard are always written; --wandb PROJECT for the rest",
    "save-frequency": "it counts epochs there; --save_every counts steps",
    "siglip": "a model has its objective; see the recipe siglip_chest_ct.yaml",
    "zeroshot-frequency": "it counts epochs there; --eval_every counts steps",
}
