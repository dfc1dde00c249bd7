"""Pre-train on packed batches: every study brings its own number of scans.

    torchrun --nproc_per_node 2 train/pretrain.py --data studies.json --out runs/mine

All processes run the same code, with gloo on CPUs and NCCL on GPUs. Leaves in the output folder `model/`
(see `HLIPModel.from_pretrained`), `checkpoint.pt`, `log.jsonl`, and TensorBoard events.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import TrainConfig
from hlip.data.batch import PackedBatch, pack
from hlip.data.studies import StudyDataset, StudyRecord, prepare_studies, read_study_list
from hlip.model.clip import HLIPModel, clip_loss, create_model
from hlip.tasks.metrics import macro_auc, read_labels
from hlip.tasks.zeroshot import Prompts, zeroshot
from sampler import StepSampler


def main() -> int:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="pretrain.py", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_class_arguments(TrainConfig)
    args = parser.parse_args()
    args.pop("config", None)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        config = TrainConfig(**vars(args))
        train(config)
    except ValueError as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def train(config: TrainConfig) -> None:
    # --- processes and device
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    checkpoint_path = config.out / "checkpoint.pt"
    if checkpoint_path.exists() and not config.resume:
        raise ValueError(f"{config.out} holds a checkpoint: pass --resume true to go on, or choose another folder")
    if config.resume and not checkpoint_path.exists():
        raise ValueError(f"{checkpoint_path}: no checkpoint to resume from")
    config.out.mkdir(parents=True, exist_ok=True)

    # --- model
    torch.manual_seed(config.seed)
    model = create_model(config.model, config.text).to(device)
    patch_size, max_positions = model.config.vision.patch_size, model.config.vision.max_scans
    max_scans = min(config.max_scans or max_positions, max_positions)
    wrapped: nn.Module = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = make_optimizer(model, config)

    # --- data
    log = Log(config, rank)
    cache = config.cache or config.out / "cache"
    records = prepare(config.data, model, cache, rank, world_size, log)
    dataset = StudyDataset(records, max_scans)
    evaluate = make_evaluation(config, model, cache, rank, world_size, log)

    first_step = 0
    if config.resume:
        first_step = load_checkpoint(checkpoint_path, model, optimizer, device)
    sampler = StepSampler(len(dataset), config.batch_size, config.steps, config.seed, rank, world_size, first_step)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=functools.partial(pack, patch_size=patch_size),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
    log.event(
        "start",
        studies=len(records),
        scans=sum(len(record.scans) for record in records),
        processes=world_size,
        device=str(device),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        first_step=first_step,
        torch=torch.__version__,
    )

    # --- steps
    text_features: dict[str, Tensor] | None = {} if model.config.text.locked else None
    progress = tqdm(total=config.steps, initial=first_step, desc="pre-training", unit="step", disable=rank > 0)
    started, studies, tokens = time.perf_counter(), 0, 0
    wrapped.train()
    for step, batch in enumerate(loader, first_step):
        # Dropout follows from (seed, step, rank) alone, so a resumed run repeats it.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            image, text, logit_scale = wrapped(batch, features_of(model, batch, text_features))
        loss = clip_loss(image.float(), text.float(), logit_scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        model.clamp_logit_scale()

        studies, tokens = studies + len(batch) * world_size, tokens + batch.layout.num_tokens
        done = step + 1
        progress.update()
        if done % config.log_every == 0 or done == config.steps:
            seconds = time.perf_counter() - started
            if not math.isfinite(float(loss.detach())):
                raise ValueError(f"step {done}: the loss is {float(loss.detach())}; lower lr, or look at the data")
            log.scalars(
                done,
                loss=float(loss.detach()),
                lr=learning_rate(config, step),
                grad_norm=float(norm),
                temperature=float(1 / logit_scale.detach()),
                studies_per_second=studies / seconds,
                tokens_per_second_of_rank_0=tokens / seconds,
            )
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if evaluate and (done == config.steps or (config.eval_every and done % config.eval_every == 0)):
            log.scalars(done, auc=evaluate())
        if done == config.steps or (config.save_every and done % config.save_every == 0):
            save_checkpoint(checkpoint_path, model, optimizer, done, rank)
    progress.close()
    if rank == 0:
        model.save_pretrained(config.out / "model")
    log.event("end", seconds=round(time.perf_counter() - started, 1))
    log.close()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def make_optimizer(model: HLIPModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; biases, norms and the temperature are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def features_of(model: HLIPModel, batch: PackedBatch, known: dict[str, Tensor] | None) -> Tensor | None:
    """States of a locked text tower, each report read once; None where the tower is trained."""
    if known is None:
        return None
    new = [text for text in dict.fromkeys(batch.texts) if text not in known]
    if new:
        with torch.no_grad():
            known.update(zip(new, model.text.features(new).float(), strict=True))
    return torch.stack([known[text] for text in batch.texts])


def gather(value: Any, world_size: int) -> list[Any]:
    """The value of every process, in order of rank."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def prepare(path: Path, model: HLIPModel, cache: Path, rank: int, world_size: int, log: Log) -> list[StudyRecord]:
    """Read a study list and preprocess its scans, shared out over the processes; count what cannot be used."""
    records = read_study_list(path)
    bar = functools.partial(tqdm, desc=f"preprocessing {path.name}", unit="study", disable=rank > 0)
    parts = gather(prepare_studies(records[rank::world_size], model.config.recipe, cache, bar), world_size)
    usable = {record.uid: record for part in parts for record in part.records}
    if not usable:
        raise ValueError(f"{path}: no study has a scan that can be used")
    log.event(
        "data",
        list=str(path),
        studies=len(usable),
        skipped_scans=sum(len(part.skipped_scans) for part in parts),
        dropped_studies=sum(len(part.dropped_studies) for part in parts),
        reasons=[reason for part in parts for reason in part.skipped_scans][:100],
    )
    return [usable[record.uid] for record in records if record.uid in usable]


def make_evaluation(config: TrainConfig, model: HLIPModel, cache: Path, rank: int, world_size: int, log: Log) -> Any:
    """A function that returns the macro AUC on the held-out studies, or None where there are none."""
    if config.val is None or config.labels is None or config.prompts is None:
        return None
    prompts = Prompts.read(config.prompts)
    labels = read_labels(config.labels, list(prompts.classes))
    records = prepare(config.val, model, cache, rank, world_size, log)
    unknown = [record.uid for record in records if record.uid not in labels]
    if unknown:
        raise ValueError(f"{config.labels}: no label for study {unknown[0]} ({len(unknown)} studies lack one)")
    dataset = StudyDataset(records, model.config.vision.max_scans)
    mine = range(rank, len(records), world_size)

    def evaluate() -> float:
        scores = zeroshot(model, (dataset[i] for i in mine), prompts) if len(mine) else ([], torch.empty(0))
        parts = gather(scores, world_size)
        uids = [uid for part in parts for uid in part[0]]
        probabilities = torch.cat([part[1] for part in parts if part[0]])
        return macro_auc(np.stack([labels[uid] for uid in uids]), probabilities.numpy())

    return evaluate


def save_checkpoint(path: Path, model: HLIPModel, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    if rank > 0:
        return
    partial = path.with_suffix(".tmp")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def load_checkpoint(path: Path, model: HLIPModel, optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Restore model and optimizer. Returns the number of steps done."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a checkpoint of this model ({error})") from error


class Log:
    """`log.jsonl` and TensorBoard, on the first process only."""

    def __init__(self, config: TrainConfig, rank: int) -> None:
        self.active = rank == 0
        if self.active:
            self.file = (config.out / "log.jsonl").open("a", encoding="utf-8")
            self.board = SummaryWriter(str(config.out / "tensorboard"))
            self.event("config", **{key: _plain(value) for key, value in dataclasses.asdict(config).items()})

    def event(self, name: str, **values: Any) -> None:
        self._write({"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **values})

    def scalars(self, step: int, **values: float) -> None:
        self._write({"step": step, **values})
        if self.active:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.active:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


if __name__ == "__main__":
    sys.exit(main())
