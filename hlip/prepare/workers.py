"""Who does the work of a job: processes of this machine, a Ray cluster, or a Slurm job array.

A job is cut into numbered units. A unit writes its result to the file system, whole or not at all, so that engines
pass numbers only. Every unit is done by `run_local` in the end, on whichever machine: it alone knows what to do when
a unit ends its process.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from ..terminal import guard_streams

Engine = Literal["local", "ray", "slurm"]
TRIES = 3  # so often a step may end its process before it is blamed: whoever kills a process once or twice is forgiven
STEP_SECONDS = 600.0  # a scan takes some seconds, unless it hangs the decoder or the storage
POLL_SECONDS = 0.5
CHUNK = 16  # units of one Ray task at most: starting a process takes as long as preparing some scans
Step = tuple[int, int]


class Event(NamedTuple):
    """What a unit says of itself: the step that begins, and what was finished since the last event."""

    step: Step | None
    studies: int
    scans: int


class Job(Protocol):
    """What engines need to know of a job, which is pickled to get to its workers."""

    def run(self, unit: int, notify: Callable[[Event], None]) -> None:
        """Do a unit; `notify` before each step that may end the process, with None before what follows the last."""

    @property
    def step_seconds(self) -> float:
        """A step that takes longer is ended."""

    def blame(self, unit: int, step: Step, rule: str, reason: str) -> None:
        """Remember that a step cannot be done, so that `run` leaves it out. `rule`: "crash" or "timeout"."""

    def is_done(self, unit: int) -> bool: ...

    def size(self, unit: int) -> tuple[int, int]:
        """Studies and scans of a unit."""


Tick = Callable[[int, int], Any]  # is told of studies and scans done


def run_local(job: Job, units: Sequence[int], workers: int, tick: Tick) -> None:
    """Do the units in `workers` spawned processes of this machine.

    A process that ends is replaced and its unit begun again. The step that ends it `TRIES` times is blamed, and so is
    one that takes too long.

    Raises:
        OSError, ImportError: as they were raised in a worker.
        RuntimeError: any other error of a worker, with its traceback; or processes that end outside of all steps.
    """
    waiting, deaths = deque(units), Counter[tuple[int, Step | None]]()
    team: dict[Any, _Worker] = {}
    looked = time.monotonic()
    try:
        while waiting or team:
            while waiting and len(team) < workers:
                worker = _Worker.start(job)
                team[worker.pipe] = worker
                worker.give(waiting.popleft())
            for pipe in connection.wait(list(team), POLL_SECONDS):
                worker = team[pipe]
                message = worker.receive()
                if message is None:
                    del team[pipe]
                    reason = worker.wait()
                    tick(-worker.done[0], -worker.done[1])
                    deaths[worker.unit, worker.step] += worker.late is None
                    if worker.late is not None:
                        job.blame(*worker.late, "timeout", f"it took more than {job.step_seconds:g} s")
                    elif deaths[worker.unit, worker.step] == TRIES:
                        if worker.step is None:
                            raise RuntimeError(
                                f"a worker process ended {TRIES} times outside of all scans ({reason}): there may be "
                                f"too little memory for {workers} workers"
                            )
                        job.blame(worker.unit, worker.step, "crash", f"it ended the process {TRIES} times ({reason})")
                    waiting.appendleft(worker.unit)
                    continue
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, Event):
                    worker.step, worker.seconds = message.step, 0.0
                    worker.done = (worker.done[0] + message.studies, worker.done[1] + message.scans)
                    tick(message.studies, message.scans)
                elif waiting:
                    worker.give(waiting.popleft())
                else:
                    del team[pipe]
                    worker.pipe.close()
                    worker.wait()
            now = time.monotonic()
            for worker in team.values():
                worker.spend(min(now - looked, 2 * POLL_SECONDS), job.step_seconds)  # a job may be halted for hours
            looked = now
    finally:
        for worker in team.values():
            worker.process.kill()
            worker.wait()


@dataclass
class _Worker:
    process: Any
    pipe: Any
    unit: int = -1
    step: Step | None = None
    done: tuple[int, int] = (0, 0)  # studies and scans of the unit
    seconds: float = 0.0  # in this step
    late: tuple[int, Step] | None = None  # the step it was ended for

    @classmethod
    def start(cls, job: Job) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, job), daemon=True)
        resource_tracker.ensure_running()  # it changes the mask when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for us: we end the workers
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return cls(process, ours)

    def give(self, unit: int) -> None:
        self.unit, self.step, self.done, self.seconds = unit, None, (0, 0), 0.0
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the next receive finds out
            self.pipe.send(unit)

    def receive(self) -> Event | Exception | int | None:
        """What the worker says: an event, what went wrong, the unit that is done; None if it has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None

    def spend(self, seconds: float, limit: float) -> None:
        """Count time against the step, and end the process when it is used up."""
        self.seconds += seconds
        if self.step is not None and self.late is None and self.seconds > limit:
            self.late = self.unit, self.step
            self.process.kill()

    def wait(self) -> str:
        """Wait for the end; returns how it came."""
        self.process.join()
        code = self.process.exitcode
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _work(pipe: Any, job: Job) -> None:
    guard_streams()  # of what the readers' libraries say of files
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            unit = pipe.recv()
            try:
                job.run(unit, pipe.send)
                pipe.send(unit)
            except (BrokenPipeError, EOFError):
                raise
            except (OSError, ImportError) as error:
                pipe.send(error)
            except Exception:
                pipe.send(RuntimeError(traceback.format_exc()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _end_with_parent() -> None:
    """No worker goes on writing when the process that leads it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _run_alone(job: Job, units: Sequence[int]) -> None:
    """What runs on another machine: one worker process under one that watches it."""
    run_local(job, [unit for unit in units if not job.is_done(unit)], 1, lambda studies, scans: None)


def run_ray(job: Job, units: Sequence[int], workers: int, tick: Tick) -> None:
    """Do the units in tasks of Ray: on the cluster that is configured or running, else on one of `workers` CPUs that
    is started here and stopped at the end.

    Raises:
        ImportError: Ray is not installed.
        OSError: a task failed; says why.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("the engine 'ray' needs Ray: pip install 'hlip-kernels[scale]'") from error

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init("auto", logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionError:
            ray.init(num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    size = max(1, min(CHUNK, len(units) // (4 * workers)))
    task = ray.remote(num_cpus=1)(_run_alone)
    chunks = deque(units[i : i + size] for i in range(0, len(units), size))
    running: list[Any] = []
    waiting = list(units)
    try:
        while chunks or running:
            while chunks and len(running) < workers:
                running.append(task.remote(job, chunks.popleft()))
            ready, running = ray.wait(running, timeout=POLL_SECONDS)
            waiting = _tell(job, waiting, tick)
            ray.get(ready)
    except ray.exceptions.RayError as error:
        raise OSError(f"a Ray task failed: {error}") from error
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
        if ours:
            ray.shutdown()


def run_slurm(
    job: Job, units: Sequence[int], workers: int, tick: Tick, folder: Path, options: Mapping[str, Any]
) -> None:
    """Do the units in a job array of `workers` tasks, sent by submitit, and wait for it.

    Args:
        folder: for submitit's files; all machines must see it.
        options: parameters of submitit's executor, such as slurm_partition or timeout_min; `cluster` is "slurm" or
            "local" (the same without Slurm, on this machine).

    Raises:
        ImportError: submitit is not installed.
        OSError: a task failed; says why. The others end before.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError("the engine 'slurm' needs submitit: pip install 'hlip-kernels[scale]'") from error

    settings = {"name": "hlip_prepare", "timeout_min": 24 * 60, "cpus_per_task": 1, **options}
    executor = submitit.AutoExecutor(folder, cluster=settings.pop("cluster", "slurm"))
    executor.update_parameters(**settings)
    chunks = [units[i::workers] for i in range(min(workers, len(units)))]
    tasks = executor.map_array(_run_alone, [job] * len(chunks), chunks)
    waiting = list(units)
    try:
        while not all(task.done() for task in tasks):
            time.sleep(POLL_SECONDS)
            waiting = _tell(job, waiting, tick)
        waiting = _tell(job, waiting, tick)
        for task in tasks:
            if (failure := task.exception()) is not None:
                raise OSError(f"Slurm task {task.job_id} failed (its log: {task.paths.stderr}): {failure}")
    finally:
        for task in tasks:
            if not task.done():
                task.cancel()


def _tell(job: Job, units: Sequence[int], tick: Tick) -> list[int]:
    """Tell of the units that were done elsewhere, by their files. Returns the others."""
    done = {unit for unit in units if job.is_done(unit)}
    for unit in done:
        tick(*job.size(unit))
    return [unit for unit in units if unit not in done]
