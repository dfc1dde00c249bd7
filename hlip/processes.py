"""The processes that share a job, as torchrun or Slurm's srun start them."""

from __future__ import annotations

import datetime
import heapq
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
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


def share(cost: np.ndarray, parts: int, size: int | None = None) -> list[np.ndarray]:
    """Share indices out so that the largest sum of costs is small: the costliest first, to the part that has least.

    Args:
        cost: (n), 0 or more.
        size: of every part; None for any, but no part stays empty.

    Returns:
        The indices of each part, increasing.
    """
    members: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, 0, place) for place in range(parts)]
    order = np.argsort(-cost, kind="stable").tolist()
    for i in order:
        load, count, place = heapq.heappop(heap)
        members[place].append(i)
        if size is None or count + 1 < size:
            heapq.heappush(heap, (load + float(cost[i]), count + 1, place))
    shares = [np.sort(np.array(indices, dtype=np.int64)) for indices in members]
    return _swap(cost, shares) if size is not None else shares


def _swap(cost: np.ndarray, parts: list[np.ndarray], most: int = 64) -> list[np.ndarray]:
    """Exchange pairs between the part that has most and that which has least, as long as it helps."""
    loads = np.array([cost[indices].sum() for indices in parts])
    for _ in range(most):
        high, low = int(loads.argmax()), int(loads.argmin())
        gap = loads[high] - loads[low]
        change = cost[parts[high]][:, None] - cost[parts[low]][None]
        best = np.abs(change - gap / 2)
        i, j = np.unravel_index(int(best.argmin()), best.shape)
        if not 0 < change[i, j] < gap or gap <= 0.005 * loads.mean():
            break
        parts[high][i], parts[low][j] = parts[low][j], parts[high][i]
        loads[high] -= change[i, j]
        loads[low] += change[i, j]
    return [np.sort(indices) for indices in parts]


def say_error(*lines: str) -> None:
    """Print an error that all processes of a job may have alike, such as a wrong argument.

    The first one prints it at once and ends, upon which torchrun ends the others. One that is still there after a
    pause has met something of its own, and says so.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(PAUSE)
    say(*lines, file=sys.stderr)
