"""The log of a run: `log.jsonl`, TensorBoard, Weights & Biases; and a watch over processes that stall."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ..output import shown_name, write_json, write_text
from ..processes import Processes
from ..read.safe import parse_json, read_lines
from ..terminal import say
from .config import TrainConfig, plain

STALLED = 4  # exit status


class Log:
    """Written by the first process only. A continued run drops what came after its checkpoint."""

    def __init__(self, config: TrainConfig, world: Processes, first_step: int) -> None:
        self.active = world.rank == 0
        self.wandb: Any = None
        if self.active:
            path = config.out / "log.jsonl"
            kept = kept_lines(path, first_step) if first_step and path.exists() else []
            write_text(path, "".join(kept))
            self.file = path.open("ab", buffering=0)
            self.told = False
            from torch.utils.tensorboard import SummaryWriter

            self.board: SummaryWriter | None = SummaryWriter(str(config.out / "tensorboard"), purge_step=first_step + 1)
            settings = {key: plain(value) for key, value in dataclasses.asdict(config).items()}
            if config.wandb:
                self.wandb = start_wandb(config, settings)
            self.event("config", **settings)

    def event(self, name: str, **values: Any) -> None:
        self._write({"event": name, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **values})

    def scalars(self, step: int, **values: float) -> None:
        self._write({"step": step, **values})
        if self.active and self.board:
            try:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
            except OSError as error:  # of its writing thread, which does not go on after that
                logging.warning("TensorBoard's events cannot be written (%s); this run goes on without", error)
                self.board = None
        if self.active and self.wandb:
            self.wandb.log(values, step=step)

    def _write(self, entry: dict[str, Any]) -> None:
        """A line, whole or not at all: a full disk costs lines, not the run."""
        if not self.active:
            return
        line = (json.dumps(entry) + "\n").encode()
        end = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.truncate(end)
            if not self.told:
                logging.warning("%s: lines are lost (%s)", self.file.name, error)
            self.told = True

    def close(self) -> None:
        if not self.active:
            return
        self.file.close()
        if self.board:
            with contextlib.suppress(OSError):
                self.board.close()
        if self.wandb:
            self.wandb.finish()


def kept_lines(path: Path, step: int) -> list[str]:
    """The lines up to a step; a last line that was cut short is dropped."""
    kept = []
    with contextlib.closing(read_lines(path, "replace")) as lines:
        for line in lines:
            try:
                entry = parse_json(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and line.endswith("\n") and entry.get("step", 0) <= step:
                kept.append(line)
    return kept


def check_loggers(config: TrainConfig) -> None:
    """Raises ImportError where what the run is logged to is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("the log needs tensorboard: pip install 'hlip-kernels[train]'")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ImportError("wandb is asked for and not installed: pip install wandb, or leave out --wandb")


def start_wandb(config: TrainConfig, settings: dict[str, Any]) -> Any:
    """A run by the name of the output folder, which a continued run finds again by its id."""
    import wandb

    place = f"{config.wandb} {config.out.absolute()}"
    paths = {key: shown_name(value) for key, value in vars(config).items() if isinstance(value, Path)}
    return wandb.init(
        project=config.wandb, name=config.out.name, id=hashlib.sha256(place.encode()).hexdigest()[:16],
        dir=str(config.out), config=settings | paths, resume="allow",
    )  # fmt: skip


def memory_gb(device: torch.device) -> float:
    """The most that this process has held: of the GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextlib.contextmanager
def noticing_sigterm() -> Iterator[threading.Event]:
    """Yield an event that is set when SIGTERM comes, which clusters send before they take a machine away."""
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


class Meter:
    """Rates since they were last read."""

    def __init__(self) -> None:
        self.started = self.since = time.perf_counter()
        self.studies = self.tokens = 0
        self.waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def count(self, studies: int, tokens: int) -> None:
        self.studies += studies
        self.tokens += tokens

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        totals = {"studies_per_second": self.studies, "tokens_per_second": self.tokens, "data_wait": self.waited}
        rates = {name: total / (now - self.since) for name, total in totals.items()}
        self.since, self.studies, self.tokens, self.waited = now, 0, 0, 0.0
        return rates


def report_not_finite(step: int, loss: float, norm: float, uids: list[str], out: Path, world: Processes) -> NoReturn:
    """Save which studies the step had, and end the run before its weights are spoilt."""
    parts = world.gather({"loss": loss, "studies": uids})
    path = out / "not_finite.json"
    if world.first:
        write_json(path, {"step": step + 1, "grad_norm": norm, "ranks": parts})
    raise ValueError(
        f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}; its studies are in {path}. Lower lr, or "
        "look at them; the last checkpoint is from before"
    )


def warn(warnings: list[str], world: Processes) -> list[str]:
    """The warnings, which the first process prints."""
    for warning in warnings if world.first else ():
        logging.warning("%s", warning)
    return warnings


class Watch:
    """Ends the run when a process is busy with one step for too long, and says which, with what.

    Every process says where it is (`at`), and a thread of it that it is alive. When a process finds itself late, it
    looks at all: those whose thread is silent too are named, or else those behind, since others only wait for them.
    Evaluating and saving take as long as they take.

    Args:
        minutes: 0 for no watch.
        folder: where `stalled.json` is written.
    """

    def __init__(self, world: Processes, minutes: float, folder: Path) -> None:
        self.world, self.seconds, self.folder = world, minutes * 60, folder
        self.every = min(10.0, self.seconds / 4)
        shared = dist.distributed_c10d._get_default_store() if world.size > 1 else dist.HashStore()
        self.store = dist.PrefixStore("watch", shared)
        self.here: dict[str, Any] = {}
        self.beats = 0
        self.done = threading.Event()
        self.at(0, "start", [])
        self.thread = threading.Thread(target=self._look, daemon=True)
        if minutes:
            self.thread.start()

    def at(self, step: int, doing: str, uids: list[str]) -> None:
        order = ("start", "reading data", "computing", "saving", "evaluating", "ending").index(doing)
        self.here = {"rank": self.world.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step,
                     "order": order, "doing": doing, "since": time.time(), "studies": uids}  # fmt: skip
        self._tell()

    def _tell(self) -> None:
        self.store.set(str(self.world.rank), json.dumps({**self.here, "beats": self.beats}))

    def _all(self) -> list[dict[str, Any]]:
        return [json.loads(self.store.get(str(rank))) for rank in range(self.world.size)]

    def _ask(self, question: Callable[[], Any]) -> Any:
        """The answer of the processes' store; None if it does not, as when the process that holds it stands."""
        answer: list[Any] = []
        thread = threading.Thread(target=lambda: answer.append(question()), daemon=True)
        thread.start()
        thread.join(max(5.0, self.every))
        return answer[0] if answer else None

    def _late(self) -> bool:
        here = self.here
        return here["doing"] not in ("saving", "evaluating") and time.time() - here["since"] > self.seconds

    def _look(self) -> None:
        while not self.done.wait(self.every):
            self.beats += 1
            self._ask(self._tell)
            if self._late():
                break
        else:
            return
        before = self._ask(self._all)
        for _ in range(3):  # whoever lives tells so in this time
            time.sleep(self.every)
            self.beats += 1
            self._ask(self._tell)
        ranks = self._ask(self._all)
        if before is None or ranks is None:
            say("hlip train: error: process 0 does not answer; waiting for it:", file=sys.stderr)
            before, ranks = [self.here], [self.here]
        silent = [
            now for was, now in zip(before, ranks, strict=True) if len(ranks) > 1 and was["beats"] == now["beats"]
        ]
        least = min((process["step"], process["order"]) for process in ranks)
        behind = silent or [process for process in ranks if (process["step"], process["order"]) == least]
        for process in behind:
            minutes = (time.time() - process["since"]) / 60
            say(
                f"hlip train: error: process {process['rank']} on {process['host']} (pid {process['pid']}) has been "
                f"{process['doing']} at step {process['step'] + 1} for {minutes:.1f} minutes; its studies are in "
                f"{self.folder / 'stalled.json'}",
                file=sys.stderr,
            )
        write_json(self.folder / "stalled.json", behind)
        os._exit(STALLED)

    def close(self) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()  # it must not be the last to hold the process group when the interpreter ends
