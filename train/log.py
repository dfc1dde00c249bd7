"""What a run says of itself: `log.jsonl`, TensorBoard, Weights & Biases; and a watch over processes that stall."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from config import TrainConfig
from engine import World

STALLED = 4  # exit status


class Log:
    """Written by the first process only. A continued run drops what came after its checkpoint."""

    def __init__(self, config: TrainConfig, world: World, first_step: int) -> None:
        self.active = world.rank == 0
        self.wandb: Any = None
        if self.active:
            path = config.out / "log.jsonl"
            kept = kept_lines(path, first_step) if first_step and path.exists() else []
            partial = path.with_name(".log.jsonl.tmp")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(path)
            self.file = path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(config.out / "tensorboard"), purge_step=first_step + 1)
            settings = {key: plain(value) for key, value in dataclasses.asdict(config).items()}
            if config.wandb:
                self.wandb = start_wandb(config, settings)
            self.event("config", **settings)

    def event(self, name: str, **values: Any) -> None:
        self._write({"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **values})

    def scalars(self, step: int, **values: float) -> None:
        self._write({"step": step, **values})
        if self.active:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            if self.wandb:
                self.wandb.log(values, step=step)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.active:
            self.file.write(json.dumps(entry) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()
            if self.wandb:
                self.wandb.finish()


def kept_lines(path: Path, step: int) -> list[str]:
    """The lines up to a step; a last line that was cut short is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and entry.get("step", 0) <= step:
            kept.append(line)
    return kept


def start_wandb(config: TrainConfig, settings: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("wandb is asked for and not installed: pip install wandb, or leave out --wandb") from error
    return wandb.init(project=config.wandb, name=config.out.name, dir=str(config.out), config=settings, resume="allow")


def plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def memory_gb(device: torch.device) -> float:
    """The most that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Watch:
    """Ends the run when a process is busy with one step for too long, and says which, with what.

    Every process says where it is (`at`), and a thread of it that it is alive. When a process finds itself late, it
    looks at all: those whose thread is silent too are named, or else those behind, since others only wait for them.

    Args:
        minutes: 0 for no watch.
        folder: where `stalled.json` is written.
    """

    def __init__(self, world: World, minutes: float, folder: Path) -> None:
        self.world, self.seconds, self.folder = world, minutes * 60, folder
        self.every = min(10.0, self.seconds / 4)
        self.store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store()) if world.size > 1 else None
        self.here: dict[str, Any] = {}
        self.beats = 0
        self.done = threading.Event()
        self.at(0, "start", [])
        self.thread = threading.Thread(target=self._look, daemon=True)
        if minutes:
            self.thread.start()

    def at(self, step: int, doing: str, uids: list[str]) -> None:
        order = ("start", "reading data", "computing", "ending").index(doing)
        self.here = {"rank": self.world.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step,
                     "order": order, "doing": doing, "since": time.time(), "studies": uids}  # fmt: skip
        self._tell()

    def _tell(self) -> None:
        if self.store is not None:
            self.store.set(str(self.world.rank), json.dumps({**self.here, "beats": self.beats}))

    def _all(self) -> list[dict[str, Any]]:
        if self.store is None:
            return [self.here]
        return [json.loads(self.store.get(str(rank))) for rank in range(self.world.size)]

    def _look(self) -> None:
        while not self.done.wait(self.every):
            self.beats += 1
            self._tell()
            if time.time() - self.here["since"] > self.seconds:
                break
        else:
            return
        before = self._all()
        for _ in range(3):  # whoever lives tells so in this time
            time.sleep(self.every)
            self.beats += 1
            self._tell()
        ranks = self._all()
        silent = [
            now
            for was, now in zip(before, ranks, strict=True)
            if self.store is not None and was["beats"] == now["beats"]
        ]
        least = min((each["step"], each["order"]) for each in ranks)
        behind = silent or [each for each in ranks if (each["step"], each["order"]) == least]
        for each in behind:
            minutes = (time.time() - each["since"]) / 60
            print(
                f"pretrain.py: error: process {each['rank']} on {each['host']} (pid {each['pid']}) has been "
                f"{each['doing']} at step {each['step'] + 1} for {minutes:.1f} minutes; its studies are in "
                f"{self.folder / 'stalled.json'}",
                file=sys.stderr,
                flush=True,
            )
        partial = self.folder / f".stalled.{self.world.rank}.tmp"
        partial.write_text(json.dumps(behind, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.folder / "stalled.json")
        os._exit(STALLED)

    def close(self) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()  # it must not be the last to hold the process group when the interpreter ends
