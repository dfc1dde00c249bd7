"""What a training run is told: every field is a flag of `train/pretrain.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal


@dataclass(frozen=True)
class TrainConfig:
    """Pre-train a model on a study list.

    Args:
        data: study list (JSON) to train on.
        out: folder for the model, the checkpoint and the logs.
        model: name of the model (`python -c "import hlip; print(hlip.list_models())"` lists them);
            clip_vit_base_scan_study_token1176 if neither this nor `init` says.
        text: folder or hub name of the BERT; the model's own if not given.
        init: model to begin with, in any layout: a folder, a training checkpoint, or a hub name.
        cache: folder for preprocessed scans, reused by later runs; `out/cache` if not given.
        val: study list to evaluate on; needs `labels` and `prompts`.
        labels: CSV with a column `study` and one of 0 and 1 per class.
        prompts: YAML with each class's names, and templates.
        device: "cpu" or "cuda"; "auto" takes GPUs if there are any.
        resume: go on from the checkpoint in `out`.
        steps: optimizer steps of the run.
        batch_size: studies of a step, over all processes.
        max_scans: draw at most this many scans of a study at each step: 10 as published, 1 for the baseline that sees
            one random scan a study, null for all scans.
        lr: peak learning rate, after warm-up.
        warmup: steps of linear warm-up; a cosine to zero follows.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only.
        grad_clip: largest norm of the gradient.
        precision: of products; weights and optimizer are fp32 in any case.
        workers: processes that read data, per rank.
        log_every: steps between two lines of the log.
        eval_every: steps between two evaluations; 0 for one at the end.
        save_every: steps between two checkpoints; 0 for one at the end.
        seed: everything random follows from it.
    """

    data: Path
    out: Path
    model: str | None = None
    text: str | None = None
    init: str | None = None
    cache: Path | None = None
    val: Path | None = None
    labels: Path | None = None
    prompts: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: bool = False
    steps: int = 17000
    batch_size: int = 256
    max_scans: int | None = 10
    lr: float = 2e-4
    warmup: int = 2000
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.2
    grad_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"
    workers: int = 4
    log_every: int = 10
    eval_every: int = 1000
    save_every: int = 1000
    seed: int = 0

    # What may differ between a run and its continuation.
    FREE: ClassVar[tuple[str, ...]] = (
        "out",
        "cache",
        "device",
        "resume",
        "init",
        "workers",
        "log_every",
        "eval_every",
        "save_every",
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_scans is not None and self.max_scans < 1:
            raise ValueError(f"max_scans must be at least 1, got {self.max_scans}")
        if self.init is not None and self.resume:
            raise ValueError("init and resume are both given: a run that goes on has its weights")
        given = [self.val is not None, self.labels is not None, self.prompts is not None]
        if any(given) and not all(given):
            raise ValueError("evaluation needs all three of val, labels and prompts")
