"""Pre-train on packed batches: every study brings its own number of scans.

    torchrun --nproc_per_node 2 train/pretrain.py --data studies.json --out runs/mine

All processes run the same code, with gloo on CPUs and NCCL on GPUs. Leaves in the output folder `model/`
(see `HLIPModel.from_pretrained`), `checkpoint.pt`, `log.jsonl`, and TensorBoard events.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import logging
import math
import os
import pickle
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
from hlip.data.batch import pack
from hlip.data.studies import StudyDataset, StudyRecord, prepare_studies, read_study_list
from hlip.model.clip import HLIPModel, create_model
from hlip.model.losses import contrastive_loss
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
    except (ValueError, OSError, ImportError) as error:
        print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def train(config: TrainConfig) -> None:
    # --- processes and device
    device = torch.device("cpu")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = World()
    checkpoint_path = config.out / "checkpoint.pt"
    if checkpoint_path.exists() and not config.resume:
        raise ValueError(f"{config.out} holds a checkpoint: pass --resume true to go on, or choose another folder")
    if config.resume and not checkpoint_path.exists():
        raise ValueError(f"{checkpoint_path}: no checkpoint to resume from")
    # --- everything that can be wrong is read before anything is written
    records = read_study_list(config.data)
    held_out = HeldOut.read(config)
    torch.manual_seed(config.seed)
    if config.init:
        model = HLIPModel.from_pretrained(config.init, config.model, config.text).to(device)
    else:
        name = config.model or "clip_vit_base_scan_study_token1176"
        model = create_model(name, pretrained_text=config.text or True).to(device)
    optimizer = make_optimizer(model, config)
    first_step = load_checkpoint(checkpoint_path, config, model, optimizer, device) if config.resume else 0

    # --- data
    config.out.mkdir(parents=True, exist_ok=True)
    log = Log(config, world, first_step)
    cache = config.cache or config.out / "cache"
    vision = model.config.vision
    records = prepare(config.data, records, model, cache, world, log)
    dataset = StudyDataset(records, config.max_scans)
    if held_out:
        held_out.prepare(config, model, cache, world, log)
    sampler = StepSampler(
        len(dataset), config.batch_size, config.steps, config.seed, world.rank, world.size, first_step
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=functools.partial(pack, patch_size=vision.patch_size),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
    )
    log.event(
        "start",
        studies=len(records),
        scans=sum(len(record.scans) for record in records),
        processes=world.size,
        device=str(device),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        first_step=first_step,
        torch=torch.__version__,
    )

    # --- steps
    wrapped: nn.Module = model
    if world.size > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    text_features = locked_features(model, records, world)
    progress = tqdm(total=config.steps, initial=first_step, desc="pre-training", unit="step", disable=world.rank > 0)
    started, studies, tokens = time.perf_counter(), 0, 0
    wrapped.train()
    for step, batch in enumerate(loader, first_step):
        # Dropout follows from (seed, step, rank) alone, so a resumed run repeats it.
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, world.rank]).generate_state(1)[0]))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            texts = model.texts(batch.impressions, batch.findings)
            known = torch.stack([text_features[text] for text in texts]) if text_features else None
            outputs = wrapped(batch, known)
        loss = contrastive_loss(outputs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        model.clamp_logit_scale()

        studies, tokens = studies + len(batch) * world.size, tokens + batch.layout.num_tokens
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
                temperature=float(1 / outputs.scale[0].detach()),
                studies_per_second=studies / seconds,
                tokens_per_second_of_rank_0=tokens / seconds,
            )
            progress.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if done == config.steps or (config.save_every and done % config.save_every == 0):
            save_checkpoint(checkpoint_path, config, model, optimizer, done, world)
        if held_out and (done == config.steps or (config.eval_every and done % config.eval_every == 0)):
            log.scalars(done, auc=held_out.auc(model, world))
    progress.close()
    if world.rank == 0:
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


class World:
    """The processes of the run. Objects are gathered over a group of their own, which may wait for days."""

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.size > 1:
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order of rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values


def locked_features(model: HLIPModel, records: list[StudyRecord], world: World) -> dict[str, Tensor] | None:
    """States of a locked text tower for every report, each read once; None where the tower is trained.

    Reports are read in the same chunks whatever the number of processes, so that the states are the same bits.
    """
    if not model.config.text.locked:
        return None
    texts = model.texts([record.impression for record in records], [record.findings for record in records])
    unique = sorted(set(texts))
    chunks = [unique[i : i + 64] for i in range(0, len(unique), 64)]
    mine = tqdm(chunks[world.rank :: world.size], "reading reports", unit="chunk", disable=world.rank > 0)
    with torch.no_grad():
        parts = world.gather([(chunk, model.text.features(chunk).float().cpu().numpy()) for chunk in mine])
    return {
        text: torch.from_numpy(state).to(model.device)
        for part in parts
        for chunk, states in part
        for text, state in zip(chunk, states, strict=True)
    }


def prepare(
    path: Path, records: list[StudyRecord], model: HLIPModel, cache: Path, world: World, log: Log
) -> list[StudyRecord]:
    """Preprocess the scans of a study list, shared out over the processes; count what cannot be used."""
    bar = functools.partial(tqdm, desc=f"preprocessing {path.name}", unit="study", disable=world.rank > 0)
    parts = world.gather(prepare_studies(records[world.rank :: world.size], model.config.preprocess, cache, bar))
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


class HeldOut:
    """Studies to evaluate on, with their labels and prompts."""

    def __init__(self, records: list[StudyRecord], labels: dict[str, np.ndarray], prompts: Prompts) -> None:
        self.records, self.labels, self.prompts = records, labels, prompts

    @classmethod
    def read(cls, config: TrainConfig) -> HeldOut | None:
        """None where the run has none. Raises ValueError naming the file that is wrong."""
        if config.val is None or config.labels is None or config.prompts is None:
            return None
        prompts = Prompts.read(config.prompts)
        labels = read_labels(config.labels, list(prompts.classes))
        return cls(read_study_list(config.val), labels, prompts)

    def prepare(self, config: TrainConfig, model: HLIPModel, cache: Path, world: World, log: Log) -> None:
        """Preprocess the scans; raise ValueError now if there could be no AUC of the studies later."""
        assert config.val is not None
        self.records = prepare(config.val, self.records, model, cache, world, log)
        unknown = [record.uid for record in self.records if record.uid not in self.labels]
        if unknown:
            raise ValueError(f"{config.labels}: no label for study {unknown[0]} ({len(unknown)} studies lack one)")
        try:
            macro_auc(self._labels(), np.zeros((len(self.records), len(self.prompts.classes))))
        except ValueError as error:
            raise ValueError(f"{config.labels}: {error}") from error
        self.dataset = StudyDataset(self.records)

    def auc(self, model: HLIPModel, world: World) -> float:
        """Macro AUC of zero-shot classification; every process embeds its share."""
        mine = range(world.rank, len(self.records), world.size)
        scores = zeroshot(model, (self.dataset[i] for i in mine), self.prompts)[1].numpy() if mine else None
        probabilities = np.empty((len(self.records), len(self.prompts.classes)), dtype=np.float32)
        for rank, part in enumerate(world.gather(scores)):
            if part is not None:
                probabilities[rank :: world.size] = part
        return macro_auc(self._labels(), probabilities)

    def _labels(self) -> np.ndarray:
        return np.stack([self.labels[record.uid] for record in self.records])


def save_checkpoint(
    path: Path, config: TrainConfig, model: HLIPModel, optimizer: torch.optim.Optimizer, step: int, world: World
) -> None:
    if world.rank > 0:
        return
    partial = path.with_suffix(".tmp")
    state = {"step": step, "config": fixed_settings(config), "model": model.state_dict()}
    torch.save(state | {"optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def load_checkpoint(
    path: Path, config: TrainConfig, model: HLIPModel, optimizer: torch.optim.Optimizer, device: torch.device
) -> int:
    """Restore model and optimizer. Returns the number of steps done.

    Raises:
        ValueError: not a checkpoint of this run; names the settings that differ.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        before, now = state["config"], fixed_settings(config)
        changed = [
            f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]
        ]
        if changed:
            raise ValueError("; ".join(changed))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except (OSError, RuntimeError, KeyError, AttributeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a checkpoint of this run ({error})") from error


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a continued run must share, as plain values."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items() if key not in TrainConfig.FREE}


class Log:
    """`log.jsonl` and TensorBoard, on the first process only. A continued run drops what came after its checkpoint."""

    def __init__(self, config: TrainConfig, world: World, first_step: int) -> None:
        self.active = world.rank == 0
        if self.active:
            path = config.out / "log.jsonl"
            kept = path.read_text(encoding="utf-8").splitlines(keepends=True) if first_step and path.exists() else []
            kept = [line for line in kept if json.loads(line).get("step", 0) <= first_step]
            path.write_text("".join(kept), encoding="utf-8")
            self.file = path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(config.out / "tensorboard"), purge_step=first_step + 1)
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
