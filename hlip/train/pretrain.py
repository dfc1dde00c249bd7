"""Pre-train on packed batches: every study brings its own number of scans.

    torchrun --nproc_per_node 8 train/pretrain.py --config train/recipes/brain_mri.yaml --data STORE --out runs/mine

All processes run the same code, with gloo on CPUs and NCCL on GPUs. Leaves in the output folder `model/`
(see `HLIPModel.from_pretrained`), `checkpoints/`, `log.jsonl`, and TensorBoard events. SIGTERM saves and ends the run
with status 0; `--resume auto` goes on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from hlip_kernels.env import describe_backends

from ..model.clip import HLIPModel, create_model
from ..model.config import ModelConfig, preset
from ..model.memory import keep_memory, release_memory
from ..output import write_text
from ..processes import say_error
from ..store.store import Store
from ..terminal import VisibleFormatter, guard_streams, guarded_streams, say
from .checkpoints import Checkpoints, whole_model
from .config import TrainConfig
from .held_out import HeldOut
from .loader import MicroBatches
from .log import Log, Watch, check_loggers, memory_gb
from .precheck import check_data, check_texts
from .sampler import Cost, StepSampler
from .settings import read_arguments
from .step import MicroBatch, World, backward, reduce_scalars, start, wrap

DEFAULT_MODEL = "clip_vit_base_scan_study_token1176"
DEFAULT_STEPS = 17000
MOST_NOT_FINITE = 30  # a scaler that begins at 2**16 has come down to 2**-14 by then
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    with guarded_streams():
        return _main()


def _main() -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        train(read_arguments(sys.argv[1:], __doc__.splitlines()[0]))
    except (ValueError, OSError, ImportError, dist.DistError) as error:
        say_error(f"pretrain.py: error: {error}")
        return 2
    except RuntimeError as error:
        lost = re.search(r"DataLoader worker|[Cc]onnection (reset|closed|refused)|NCCL|gloo", str(error))
        if not lost:
            raise
        what = " ".join(str(error).split())
        if not lost[0].startswith("DataLoader"):
            what = f"another process has ended ({what[:200]})"
        say(f"pretrain.py: error: {what}; --resume auto goes on from the last checkpoint", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("pretrain.py: interrupted; --resume auto goes on from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def train(config: TrainConfig) -> None:
    # --- everything that can be wrong is read before anything is written
    if config.fsdp and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        raise ValueError("fsdp needs processes: start this with torchrun or srun")
    if config.fsdp and torch.__version__ < "2.7":  # fully_shard takes no ignored_params before
        raise ValueError(f"fsdp needs PyTorch 2.7 or newer, this is {torch.__version__}")
    device, world = start(config.device)
    if device.type == "cpu":
        keep_memory()
    checkpoints = Checkpoints(config, world)
    resuming = str(config.resume).lower()
    resume = resuming == "true" or (resuming == "auto" and bool(checkpoints.all()))
    if checkpoints.all() and not resume:
        raise ValueError(f"{config.out} holds checkpoints: pass --resume auto to go on, or choose another folder")
    check_loggers(config)
    torch.manual_seed(config.seed)
    store = Store(config.data)
    store.check_finished()
    per_epoch = len(store) // config.batch_size
    steps = config.epochs * per_epoch if config.epochs else config.steps or DEFAULT_STEPS
    warnings = warn(check_data(config, store, steps), world)
    model = make_model(config).to(device)
    scan_tokens = np.split(store.scan_tokens(model.config.vision.patch_size), store.first[1:-1])  # study by study
    checkpoints.data = {"studies": len(store), "source_hash": store.info["source_hash"]}
    held_out = HeldOut.read(config, model.config)
    warnings += warn(check_texts(config, store, model), world)
    model.visual.trunk.set_grad_checkpointing(config.grad_checkpointing)
    features = locked_features(model, store, world) if keeps_features(config, model) else None
    wrapped = wrap(model, world, config.fsdp)
    if config.compile:
        model.visual.trunk.compile(dynamic=True)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    first_step = checkpoints.load(model, optimizer, scaler) if resume else 0
    check_agreement(world, first_step, checkpoints)

    sampler = StepSampler(
        scan_tokens, Cost(model.config.vision), config.batch_size, steps, config.seed, world.rank,
        world.size, config.max_scans, config.micro_tokens, config.balance == "cost", first_step,
    )  # fmt: skip
    loader = DataLoader(
        MicroBatches(store, model.config, config.texts, config.sentence_dropout),
        batch_size=None,
        sampler=sampler,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=config.workers > 0,
        worker_init_fn=outlive_sigterm,
    )
    config.out.mkdir(parents=True, exist_ok=True)
    log = Log(config, world, first_step)
    facts = {
        "studies": len(store), "scans": len(store.shapes), "processes": world.size, "device": str(device),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "first_step": first_step,
        "steps": steps, "batch_size": config.batch_size, "peak_lr": peak_lr(config),
        "tokens_per_step": round(np.mean([sampler.plan(step).tokens for step in range(min(steps, 8))])),
        "warnings": warnings, "torch": torch.__version__,
    }  # fmt: skip
    log.event("start", **facts)
    if world.rank == 0:
        head_dim = model.config.vision.width // model.config.vision.heads
        backends = describe_backends(device.type, DTYPES[config.precision], head_dim)
        say(*describe(model.config, facts, backends).split("\n"))

    # --- steps
    autocast = functools.partial(torch.autocast, device.type, DTYPES[config.precision], config.precision != "fp32")
    watch = Watch(world, config.stall_minutes, config.out)
    terminated = Terminated()
    progress = tqdm(total=steps, initial=first_step, desc="pre-training", unit="step", disable=world.rank > 0)
    meter, saved = Meter(), time.monotonic()
    wrapped.train()
    failure: OSError | None = None
    not_finite = 0  # fp16 steps in a row that the scaler left out
    with terminated, contextlib.closing(watch), contextlib.closing(log):
        batches = iter(loader)
        for step in range(first_step, steps):
            plan = sampler.plan(step)
            watch.at(
                step, "reading data", [store.uids[item.study] for piece in plan.ranks[world.rank] for item in piece]
            )
            with meter.waiting():
                pieces = [next(batches) for _ in plan.ranks[world.rank]]
            if features is not None:
                pieces = [replace(piece, texts=features(piece.texts)) for piece in pieces]
            watch.at(step, "computing", [uid for piece in pieces for uid in piece.uids])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps)
            optimizer.zero_grad(set_to_none=True)
            loss, outputs = backward(wrapped, pieces, device, autocast, config.local_loss, plan.studies, scaler.scale)
            reduce_scalars(model, world)
            scaler.unscale_(optimizer)
            norm = clip_gradient(model, config.grad_clip)
            not_finite = 0 if math.isfinite(norm) else not_finite + 1
            bad = not math.isfinite(loss) or not_finite > (MOST_NOT_FINITE if scaler.is_enabled() else 0)
            overdue = config.save_minutes is not None and time.monotonic() - saved > 60 * config.save_minutes
            bad, overdue, stop = world.any(bad, overdue, terminated.flag)
            if bad:
                report_not_finite(step, float(loss), norm, pieces, config.out, world)
            scaler.step(optimizer)
            scaler.update()
            model.clamp_logit_scale()

            done, last = step + 1, step + 1 == steps
            progress.update()
            meter.count(sum(plan.studies), plan.tokens)
            if done % config.log_every == 0 or last:
                mean = float(np.mean(world.gather(float(loss))))
                log.scalars(
                    done, loss=mean, lr=learning_rate(config, step, steps), grad_norm=norm,
                    temperature=float(1 / outputs.scale[0]), logit_scale=float(outputs.scale[0].log()),
                    **meter.read(), padding=0.0, balance=plan.balance, memory_gb=memory_gb(device),
                )  # fmt: skip
                progress.set_postfix(loss=f"{mean:.3f}")
            if last or stop or overdue or (config.save_every and done % config.save_every == 0):
                watch.at(done, "saving", [])
                failure = save(checkpoints, model, optimizer, scaler, done, log, wait=last or stop)
                saved = time.monotonic()
            if stop and not last:
                log.event("terminated", step=done)
                if world.rank == 0 and not failure:
                    say(f"pretrain.py: SIGTERM: saved after step {done}; --resume auto goes on", file=sys.stderr)
                break
            if held_out and (last or (config.eval_every and done % config.eval_every == 0)):
                watch.at(done, "evaluating", [])
                log.scalars(done, auc=held_out.auc(model, world))
            watch.at(done, "ending" if last else "start", [])
        else:
            save_model(model, config.out / "model", world)
            log.event("end", seconds=round(meter.seconds(), 1))
        progress.close()
        world.gather(None)  # nobody leaves while others still wait for an answer
    if failure:
        raise failure


def check_agreement(world: World, first_step: int, checkpoints: Checkpoints) -> None:
    """Processes that see another store or another folder of checkpoints would train apart in silence.

    Raises:
        ValueError: they do; says what each sees.
    """
    seen = world.gather({"first_step": first_step, **checkpoints.data})
    if any(each != seen[0] for each in seen):
        raise ValueError(
            f"processes see different things, so data and out must be shared by all of them: {dict(enumerate(seen))}"
        )


def warn(warnings: list[str], world: World) -> list[str]:
    """The warnings, which the first process prints."""
    for warning in warnings if world.rank == 0 else ():
        logging.warning("%s", warning)
    return warnings


def outlive_sigterm(worker: int) -> None:
    """Clusters send SIGTERM to all processes, those that read data too, which are needed until the step is done.
    A second one ends them."""
    guard_streams()  # which a new interpreter does not inherit
    release_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def make_model(config: TrainConfig) -> HLIPModel:
    """The model to begin with: new by name, or read, with what the run changes of it."""
    if not config.init:
        name = config.model or DEFAULT_MODEL
        changed = with_changes(preset(name), config)
        return create_model(name, config.text or True, config.vision, vision=changed.vision, text=changed.text)
    begun = HLIPModel.from_pretrained(config.init, config.model, config.text)
    model = HLIPModel(with_changes(begun.config, config), begun.text.source)
    model.text.tokenizer_source = begun.text.tokenizer_source
    model.load_state_dict(begun.state_dict())
    return model


def with_changes(model: ModelConfig, config: TrainConfig) -> ModelConfig:
    rates = {name: getattr(config, name) for name in ("patch_dropout", "drop_path")}
    vision = replace(model.vision, **{name: rate for name, rate in rates.items() if rate is not None})
    locked = model.text.locked if config.lock_text is None else config.lock_text
    return replace(
        model, vision=vision, text=replace(model.text, locked=locked, unlocked_layers=config.unlocked_layers)
    )


def peak_lr(config: TrainConfig) -> float:
    return config.lr * (config.batch_size / config.lr_batch if config.lr_batch else 1)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    peak = peak_lr(config)
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, steps - config.warmup)))


def make_optimizer(model: HLIPModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; biases, norms and the temperature are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0},  # not sharded, so not among the others
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def clip_gradient(model: nn.Module, most: float) -> float:
    """Scale the gradient down to a norm of `most`, unless that is 0. Returns its norm before."""
    trained = [p for p in model.parameters() if p.grad is not None]
    kinds = [[p for p in trained if isinstance(p.grad, DTensor) is sharded] for sharded in (False, True)]
    kinds = [kind for kind in kinds if kind]
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack(norms).norm()
    if most:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, most, total)
    return float(total)


def locked_features(model: HLIPModel, store: Store, world: World) -> Callable[[Sequence[str]], Tensor]:
    """States of a fixed text tower for every report of the store, each read once: texts to (N, W).

    Reports are read in the same chunks whatever the number of processes, so that the states are the same bits.
    """
    model.eval()  # no dropout; a step sets what it needs
    impressions, findings = (store.manifest.column(name).to_pylist() for name in ("impression", "findings"))
    unique = sorted(set(model.config.texts(impressions, findings)))
    chunks = [unique[i : i + 64] for i in range(0, len(unique), 64)]
    mine = tqdm(chunks[world.rank :: world.size], "reading reports", unit="chunk", disable=world.rank > 0)
    with torch.no_grad():
        parts = world.gather([model.text.features(chunk).float().cpu().numpy() for chunk in mine])
    table = torch.from_numpy(np.concatenate([parts[i % world.size][i // world.size] for i in range(len(chunks))]))
    rows = {text: i for i, text in enumerate(unique)}
    return lambda texts: table[[rows[text] for text in texts]]


def keeps_features(config: TrainConfig, model: HLIPModel) -> bool:
    return model.text.fixed and config.texts == "report" and config.sentence_dropout == 0


def describe(model: ModelConfig, facts: dict[str, Any], backends: str) -> str:
    """What a run is, in a few lines, for people."""
    return "\n".join(
        [
            f"{facts['studies']} studies, {facts['scans']} scans; {facts['parameters'] / 1e6:.1f} million parameters; "
            f"objective {model.objective}",
            f"{facts['steps']} steps of {facts['batch_size']} studies on {facts['processes']} processes, about "
            f"{facts['tokens_per_step']} tokens each; peak learning rate {facts['peak_lr']:g}",
            f"levels: {' '.join(model.vision.levels)}",
            backends,
        ]
    )


def report_not_finite(
    step: int, loss: float, norm: float, pieces: Sequence[MicroBatch], out: Path, world: World
) -> NoReturn:
    """Save which studies the step had, and end the run before its weights are spoilt."""
    parts = world.gather({"loss": loss, "studies": [uid for piece in pieces for uid in piece.uids]})
    path = out / "not_finite.json"
    if world.rank == 0:
        content = json.dumps({"step": step + 1, "grad_norm": norm, "ranks": parts}, indent=1) + "\n"
        write_text(path, content)
    raise ValueError(
        f"step {step + 1}: the loss is {loss}, the gradient's norm {norm}; its studies are in {path}. Lower lr, or "
        "look at them; the last checkpoint is from before"
    )


def save(
    checkpoints: Checkpoints, model: HLIPModel, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    step: int, log: Log, wait: bool,
) -> OSError | None:  # fmt: skip
    """Save a checkpoint. One that fails is reported, and returned if there is no later chance."""
    failure = None
    attempts: list[Callable[[], None]] = [
        checkpoints.wait, lambda: checkpoints.save(model, optimizer, scaler, step), *[checkpoints.wait] * wait
    ]  # fmt: skip
    for attempt in attempts:
        try:
            attempt()
            failure = None
        except OSError as error:
            failure = error
            log.event("checkpoint_failed", step=step, reason=str(error))
            logging.warning("%s", error)
    return failure if wait else None


def save_model(model: HLIPModel, folder: Path, world: World) -> None:
    """Write the trained model, whole, on the first process."""
    state = whole_model(model)
    if world.rank == 0:
        plain = HLIPModel(model.config, model.text.source)
        plain.text.tokenizer_source = model.text.tokenizer_source
        plain.load_state_dict(state)
        try:
            plain.save_pretrained(folder)
        except SafetensorError as error:  # a full disk, say
            raise OSError(f"{folder}: the model could not be written ({error})") from error


class Terminated:
    """Whether SIGTERM came, which clusters send before they take a machine away."""

    def __init__(self) -> None:
        self.flag = False

    def __enter__(self) -> Terminated:
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "flag", True))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)


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
        span = now - self.since
        rates = {"studies_per_second": self.studies / span, "tokens_per_second": self.tokens / span}
        rates["data_wait"] = self.waited / span
        self.since, self.studies, self.tokens, self.waited = now, 0, 0, 0.0
        return rates

    def seconds(self) -> float:
        return time.perf_counter() - self.started
