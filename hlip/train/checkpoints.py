"""The model that a run begins with, its checkpoints, `checkpoints/step_00001000.pt`, and the model that it leaves.

Every checkpoint is whole, and written behind the run's back.

A checkpoint is the same whatever the number of processes and however they share the model, so a run may go on with
others. Everything random follows from (seed, step), so weights, optimizer and loss scale are all there is to keep. The
model's configuration and tokenizer lie beside them, so that `HLIPModel.from_pretrained` reads a checkpoint by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_map

from ..model.clip import HLIPModel, create_model
from ..model.config import ModelConfig, preset
from ..model.weights import FILES, FORMAT
from ..output import locked, replacing
from ..processes import Processes
from ..read.paths import check_within
from ..read.safe import check_format
from ..read.tensors import load_tensors
from .config import DEFAULTS, FREE, TrainConfig, plain
from .log import Log
from .step import Optimizer

DEFAULT_MODEL = "clip_vit_base_scan_study_token1176"


class Checkpoints:
    """The checkpoints in one folder. The first process writes them, in a thread, one at a time."""

    def __init__(self, config: TrainConfig, world: Processes) -> None:
        self.folder = config.out / "checkpoints"
        self.config, self.world = config, world
        self.data: dict[str, Any] = {}  # what tells the data set from others
        self.writer = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.saved = time.monotonic()

    def all(self) -> list[Path]:
        """Whole checkpoints, the latest last."""
        return sorted(path for path in self.folder.glob("step_*.pt") if re.fullmatch(r"step_\d{8}\.pt", path.name))

    def are_resumed(self) -> bool:
        """Raises ValueError where there are some, and the run does not go on from them."""
        if self.config.resume == "false" and self.all():
            raise ValueError(
                f"{self.config.out} holds checkpoints: pass --resume auto to go on, or choose another folder"
            )
        return self.config.resume == "true" or bool(self.all())

    def is_overdue(self) -> bool:
        return self.config.save_minutes is not None and time.monotonic() - self.saved > 60 * self.config.save_minutes

    def save(self, model: HLIPModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int) -> None:
        """Copy what there is to keep, and write it while the run goes on.

        Raises:
            OSError: what the save before this one failed with. The checkpoints from before it are as they were.
        """
        self.wait()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = {
            "hlip_format": FORMAT,
            "step": step,
            "config": fixed_settings(self.config),
            "data": self.data,
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            "scaler": scaler.state_dict(),
        }
        if self.world.rank == 0:
            state[FILES] = model.files()
            state = tree_map(lambda value: value.cpu().clone() if isinstance(value, torch.Tensor) else value, state)
            self.pending = self.writer.submit(self._write, state, step)

    def attempt(self, model: HLIPModel, optimizer: Optimizer, step: int, log: Log, last: bool) -> OSError | None:
        """Save. A failure is reported, and returned if there is no later chance."""
        failure = None
        save = functools.partial(self.save, model, optimizer.adamw, optimizer.scaler, step)
        acts: list[Callable[[], None]] = [self.wait, save, *[self.wait] * last]
        for act in acts:
            try:
                act()
                failure = None
            except OSError as error:
                failure = error
                log.event("checkpoint_failed", step=step, reason=str(error))
                logging.warning("%s", error)
        self.saved = time.monotonic()
        return failure if last else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the run's folder, which is made. Raises ValueError if one is there already."""
        with contextlib.ExitStack() as stack:
            if self.world.first:
                self.config.out.mkdir(parents=True, exist_ok=True)
                what = "another run is training here; wait for its end, or choose another folder"
                stack.enter_context(locked(self.config.out / "lock", f"{self.config.out}: {what}"))
            yield

    def _write(self, state: dict[str, Any], step: int) -> None:
        path = self.folder / f"step_{step:08d}.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in chain(self.folder.glob(".step_*.tmp"), self.folder.glob("step_*.tmp")):  # of killed runs
                unfinished.unlink()
            with replacing(path) as partial:
                torch.save(state, partial)
            for old in self.all()[: -self.config.keep]:
                old.unlink()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
            kept = self.all()
            left = f"{kept[-1].name} is whole" if kept else "there is none yet"
            raise OSError(f"{path}: the checkpoint could not be written ({error}); {left}") from error

    def wait(self) -> None:
        """Wait for the save under way; raise the OSError that it failed with."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    @functools.cached_property
    def latest(self) -> tuple[Path, dict[str, Any]]:
        """The latest that is whole: its file and content.

        Raises:
            ValueError: there is none.
        """
        saved = self.all()
        if not saved:
            raise ValueError(
                f"{self.folder}: no checkpoint to resume from; with --resume auto a run without any begins"
            )
        for path in reversed(saved):
            try:
                check_within(path, self.folder)
                return path, load_tensors(path, checksums=True)
            except (OSError, ValueError) as error:
                if path == saved[0]:
                    raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
                logging.warning("%s: not a readable checkpoint (%s); going on from the one before", path, error)
        raise AssertionError("the first checkpoint was read, or an error raised")

    def model(self) -> HLIPModel:
        """The model that a run goes on with, as it was configured when the run began."""
        path, state = self.latest
        if FILES in state:
            return HLIPModel.from_pretrained(path, text=self.config.text)
        # Of a checkpoint that does not say how its model was configured: no model cleaned texts then.
        name = self.config.model or DEFAULT_MODEL
        begun = make_model(self.config) if self.config.init else HLIPModel.from_pretrained(path, name, self.config.text)
        config = with_changes(begun.config, self.config)
        return rebuilt(begun, replace(config, text=replace(config.text, clean=False)), begun.state_dict())

    def load(self, model: HLIPModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """Restore the latest that is whole. Returns the number of steps done.

        Raises:
            ValueError: there is none, or it is of another run; names the settings that differ.
        """
        path, state = self.latest
        del self.latest  # it takes memory
        try:
            check_format(state.get("hlip_format", FORMAT), FORMAT)
            # A setting that a checkpoint lacks came later; its default is what was done before.
            before, now = {**DEFAULTS, **state["config"], **state["data"]}, fixed_settings(self.config) | self.data
            changed = [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]
            if changed:
                raise ValueError("; ".join(changed))
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(model, state["model"], options=options)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            scaler.load_state_dict(state["scaler"])
            return int(state["step"])
        except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a checkpoint of this run ({error})") from error


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a continued run must share, as plain values."""
    return {key: plain(value) for key, value in dataclasses.asdict(config).items() if key not in FREE}


def make_model(config: TrainConfig) -> HLIPModel:
    """The model to begin with: new by name, or read, with what the run changes of it."""
    if not config.init:
        name = config.model or DEFAULT_MODEL
        changed = with_changes(preset(name), config)
        return create_model(name, config.text or True, config.vision, vision=changed.vision, text=changed.text)
    begun = HLIPModel.from_pretrained(config.init, config.model, config.text)
    return rebuilt(begun, with_changes(begun.config, config), begun.state_dict())


def rebuilt(model: HLIPModel, config: ModelConfig, state: dict[str, Any]) -> HLIPModel:
    """A model of another configuration, and the tower of texts of this one."""
    other = HLIPModel(config, model.text.source)
    other.text.tokenizer_source = model.text.tokenizer_source
    other.load_state_dict(state)
    return other


def with_changes(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    """The model as a run trains it: with the rates, and what of the text tower is trained, that its settings say."""

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    vision = replace(model.vision, **given(patch_dropout=config.patch_dropout, drop_path=config.drop_path))
    text = replace(
        model.text, **given(locked=config.lock_text, unlocked_layers=config.unlocked_layers,
                            train_norms=config.train_norms, locked_dropout=config.locked_dropout),
    )  # fmt: skip
    return replace(model, vision=vision, text=text)


def save_model(model: HLIPModel, folder: Path, world: Processes) -> None:
    """Write the trained model, whole, on the first process; must be called on all."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if world.first:
        try:
            rebuilt(model, model.config, state).save_pretrained(folder)
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{folder}: the model could not be written ({error})") from error


def check_agreement(world: Processes, first_step: int, checkpoints: Checkpoints) -> None:
    """Processes that see another store or another folder of checkpoints would train apart in silence.

    Raises:
        ValueError: they do; says what each sees.
    """
    seen = world.gather({"first_step": first_step, **checkpoints.data})
    if any(facts != seen[0] for facts in seen):
        raise ValueError(
            f"processes see different things, so data and out must be shared by all of them: {dict(enumerate(seen))}"
        )
