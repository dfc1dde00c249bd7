"""Pre-train on packed batches: every study brings its own number of scans.

    torchrun --nproc_per_node 8 train/pretrain.py --config train/recipes/brain_mri.yaml --data STORE --out runs/mine

All processes run the same code, with gloo on CPUs and NCCL on GPUs. Leaves in the output folder `model/`
(see `HLIPModel.from_pretrained`), `checkpoints/`, `log.jsonl`, and TensorBoard events. SIGTERM saves and ends the run
with status 0; `--resume auto` goes on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from hlip_kernels.env import describe_backends

from ..embed.inputs import unlike
from ..processes import leave, say_error
from ..store.store import Store
from ..terminal import VisibleFormatter, guarded_streams, say
from .checkpoints import Checkpoints, check_agreement, make_model, save_model
from .config import TrainConfig, read_arguments
from .held_out import HeldOut
from .loader import locked_features, read_batches
from .log import Log, Meter, Watch, check_loggers, memory_gb, noticing_sigterm, report_not_finite, warn
from .precheck import check_data, check_texts, take_recipe
from .sampler import Cost, StepSampler
from .step import DTYPES, Optimizer, backward, peak_lr, start, wrap

DEFAULT_STEPS = 17000


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    with guarded_streams():
        return _main(sys.argv[1:] if arguments is None else arguments)


def _main(arguments: list[str]) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        train(read_arguments(arguments, "hlip train", __doc__.splitlines()[0]))
    except (ValueError, OSError, ImportError, dist.DistError) as error:
        say_error(f"hlip train: error: {error}")
        return 2
    except RuntimeError as error:
        lost = re.search(r"DataLoader worker|[Cc]onnection (reset|closed|refused)|NCCL|gloo", str(error))
        if not lost:
            raise
        what = " ".join(str(error).split())
        if not lost[0].startswith("DataLoader"):
            what = f"another process has ended ({what[:200]})"
        say(f"hlip train: error: {what}; --resume auto goes on from the last checkpoint", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("hlip train: interrupted; --resume auto goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        leave()
    return 0


def train(config: TrainConfig) -> None:
    run = Run(config)
    with run.checkpoints.locked(), contextlib.closing(Log(config, run.world, run.first_step)) as log:
        run.announce(log)
        run.make_steps(log)


class Run:
    """A run of pre-training. Everything that can be wrong is read before anything is written."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device, self.world = start(config)
        self.checkpoints = Checkpoints(config, self.world)
        resume = self.checkpoints.are_resumed()
        check_loggers(config)
        torch.manual_seed(config.seed)

        # --- data and model
        self.store = store = Store(config.data)
        store.check_finished()
        epochs = (config.epochs or 0) * (len(store) // config.batch_size)
        self.steps = epochs if config.epochs else config.steps or DEFAULT_STEPS
        self.warnings = warn(check_data(config, store, self.steps), self.world)
        self.model = model = (self.checkpoints.model() if resume else make_model(config)).to(self.device)
        scan_tokens = np.split(store.scan_tokens(model.config.vision.patch_size), store.first[1:-1])  # study by study
        self.checkpoints.data = {"studies": len(store), "source_hash": store.info["source_hash"]}
        self.held_out = HeldOut.read(config, model.config)
        self.warnings += warn([*take_recipe(model, store), *check_texts(config, store, model)], self.world)
        if self.held_out:
            self.warnings += warn(unlike(model.config.recipe, self.held_out.store), self.world)
        model.visual.trunk.set_grad_checkpointing(config.grad_checkpointing)
        fixed = model.text.fixed and config.wording.fixed
        self.features = locked_features(model, store, self.world, config.wording) if fixed else None
        self.wrapped = wrap(model, self.world, config.fsdp)
        if config.compile:
            model.visual.trunk.compile(dynamic=True)

        # --- what the steps follow from
        self.optimizer = Optimizer(model, config, self.steps, self.device)
        self.first_step = self.checkpoints.load(model, self.optimizer.adamw, self.optimizer.scaler) if resume else 0
        check_agreement(self.world, self.first_step, self.checkpoints)
        self.sampler = StepSampler(
            scan_tokens, Cost(model.config.vision), config.batch_size, self.steps, config.seed, self.world.rank,
            self.world.size, config.max_scans, config.micro_tokens, config.balance == "cost", self.first_step,
        )  # fmt: skip

    def announce(self, log: Log) -> None:
        """Log what begins, and say it in a few lines."""
        facts: dict[str, Any] = {
            "studies": len(self.store), "scans": len(self.store.shapes), "processes": self.world.size,
            "device": str(self.device),
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "first_step": self.first_step, "steps": self.steps, "batch_size": self.config.batch_size,
            "peak_lr": peak_lr(self.config),
            "tokens_per_step": round(np.mean([self.sampler.plan(i).tokens for i in range(min(self.steps, 8))])),
            "warnings": self.warnings, "torch": torch.__version__,
        }  # fmt: skip
        log.event("start", **facts)
        vision, dtype = self.model.config.vision, DTYPES[self.config.precision]
        if self.world.first:
            say(
                f"{facts['studies']} studies, {facts['scans']} scans; {facts['parameters'] / 1e6:.1f} million "
                f"parameters; objective {self.model.config.objective}",
                f"{facts['steps']} steps of {facts['batch_size']} studies on {facts['processes']} processes, about "
                f"{facts['tokens_per_step']} tokens each; peak learning rate {facts['peak_lr']:g}",
                f"levels: {' '.join(vision.levels)}",
                *describe_backends(self.device.type, dtype, vision.width // vision.heads).split("\n"),
            )

    def make_steps(self, log: Log) -> None:
        """Make the steps that are left, and leave the model."""
        config, device, world, model, optimizer = self.config, self.device, self.world, self.model, self.optimizer
        first_step, steps, failure, meter = self.first_step, self.steps, None, Meter()
        autocast = functools.partial(torch.autocast, device.type, DTYPES[config.precision], config.precision != "fp32")
        batches = read_batches(config, self.store, model.config, self.sampler, device, self.features)
        watch = Watch(world, config.stall_minutes, config.out)
        progress = tqdm(total=steps, initial=first_step, desc="pre-training", unit="step", disable=not world.first)
        self.wrapped.train()
        with noticing_sigterm() as terminated, contextlib.closing(watch), progress:
            for step in range(first_step, steps):
                plan, done, last = self.sampler.plan(step), step + 1, step + 1 == steps
                mine = plan.ranks[world.rank]
                watch.at(step, "reading data", [self.store.uids[item.study] for items in mine for item in items])
                with meter.waiting():
                    pieces = [next(batches) for _ in mine]
                uids = [uid for piece in pieces for uid in piece.uids]
                watch.at(step, "computing", uids)
                rate = optimizer.begin(step)
                compare = functools.partial(model.objective.loss, local_loss=config.local_loss, counts=plan.studies)
                loss, outputs = backward(self.wrapped, compare, pieces, device, autocast, optimizer.scaler.scale)
                norm = optimizer.limit(world)
                spoilt, overdue, stop = world.any(
                    optimizer.is_spoilt(loss, norm), self.checkpoints.is_overdue(), terminated.is_set()
                )
                if spoilt:
                    report_not_finite(step, float(loss), norm, uids, config.out, world)
                optimizer.update()

                progress.update()
                meter.count(sum(plan.studies), plan.tokens)
                if done % config.log_every == 0 or last:
                    mean, scale = float(np.mean(world.gather(float(loss)))), outputs.scale[0]
                    log.scalars(
                        done, loss=mean, lr=rate, grad_norm=norm, temperature=float(1 / scale),
                        logit_scale=float(scale.log()), **meter.read(), padding=0.0, balance=plan.balance,
                        memory_gb=memory_gb(device),
                    )  # fmt: skip
                    progress.set_postfix(loss=f"{mean:.3f}")
                if last or stop or overdue or (config.save_every and done % config.save_every == 0):
                    watch.at(done, "saving", [])
                    failure = self.checkpoints.attempt(model, optimizer, done, log, last or stop)
                if stop and not last:
                    log.event("terminated", step=done)
                    if world.first and not failure:
                        say(f"hlip train: SIGTERM: saved after step {done}; --resume auto goes on", file=sys.stderr)
                    break
                if self.held_out and (last or (config.eval_every and done % config.eval_every == 0)):
                    watch.at(done, "evaluating", [])
                    log.scalars(done, auc=self.held_out.auc(model, world))
                watch.at(done, "ending" if last else "start", [])
            else:
                save_model(model, config.out / "model", world)
                log.event("end", seconds=round(time.perf_counter() - meter.started, 1))
            world.gather(None)  # nobody leaves while others still wait for an answer
        if failure:
            raise failure
