"""The processes that share a job, as torchrun or Slurm's srun start them."""

from __future__ import annotations

import datetime
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .terminal import say

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # one process may have work for days while another waits
PAUSE = 15  # seconds


@dataclass(frozen=True)
class Processes:
    """The place of this process among all. Alone, nothing is sent.

    group: over which they agree, apart from gradients; it uses gloo on any device, and waits for `PATIENCE`.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The first process' value."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, *values: bool) -> tuple[bool, ...]:
        """Whether each is so on any process."""
        if self.size == 1:
            return values
        flags = torch.tensor([int(value) for value in values])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return tuple(flag > 0 for flag in flags.tolist())

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier(group=self.group)


def join(backend: str = "gloo", alone: bool = False) -> Processes:
    """Join the processes that torchrun started, if it did.

    alone: join also where this is the only one, as sharded models need.

    Raises:
        ValueError: only one of RANK and WORLD_SIZE is set.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) == 1:
        raise ValueError(
            f"{given[0]} is set without the other of RANK and WORLD_SIZE: start this with torchrun, or unset it"
        )
    if not given or (int(os.environ["WORLD_SIZE"]) == 1 and not alone):
        return Processes()
    dist.init_process_group(backend)
    return Processes(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))


def join_on(device: str) -> tuple[torch.device, Processes]:
    """Join the processes that torchrun or srun started, with NCCL if they use GPUs. Returns this one's device, too.

    device: "cpu", "cuda", or "auto", which takes GPUs if there are any.

    Raises:
        ValueError: fewer GPUs than processes on this machine.
    """
    environment = os.environ
    # Only srun sets a step's variables: a batch script's own process is alone, whatever the job's number of tasks.
    if "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 40000))
        for name, theirs in {"RANK": "PROCID", "WORLD_SIZE": "STEP_NUM_TASKS", "LOCAL_RANK": "LOCALID"}.items():
            environment[name] = environment[f"SLURM_{theirs}"]
    place = torch.device("cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        place = torch.device("cuda", int(environment.get("LOCAL_RANK", 0)))
        if place.index >= (count := torch.cuda.device_count()):
            raise ValueError(f"device {device!r}: this process wants {place}, and PyTorch sees {count} GPUs")
        torch.cuda.set_device(place)
    return place, join("nccl" if place.type == "cuda" else "gloo", alone=True)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: of "gpu[03-05,9],login" it is gpu03."""
    name, bracket, rest = nodes.partition(",")[0].partition("[")
    return name + re.split("[],-]", rest)[0] if bracket else name


def leave() -> None:
    """Leave the processes that were joined, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, for a while. Little is sent, so it goes over gloo on any device."""
    try:
        yield join()
    finally:
        leave()


def say_error(*lines: str) -> None:
    """Print an error that all processes of a job may have alike, such as a wrong argument.

    The first one prints it at once and ends, upon which torchrun ends the others. One that is still there after a
    pause has met something of its own, and says so.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(PAUSE)
    say(*lines, file=sys.stderr)
