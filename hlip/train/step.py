"""The model that the processes of a run share, one step's gradient in as many pieces as memory asks for, and the
optimizer."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hlip_kernels import hold_weights

from ..model.clip import HLIPModel
from ..model.memory import keep_memory
from ..model.plan import TokenBatch
from ..objective import Outputs
from ..processes import Processes, join_on
from .config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_NOT_FINITE = 30  # a scaler that begins at 2**16 has come down to 2**-14 by then


@dataclass
class MicroBatch:
    """The studies that the model reads at once.

    texts: of its studies, as the objective's `texts` gives them; or their features.
    uids: one per study.
    seed: of what is drawn in forward.
    """

    tokens: TokenBatch
    texts: list[str] | Tensor
    uids: list[str]
    seed: int

    def pin_memory(self) -> MicroBatch:
        return replace(self, tokens=self.tokens.pin_memory())

    def to(self, device: torch.device) -> MicroBatch:
        texts = self.texts.to(device, non_blocking=True) if isinstance(self.texts, Tensor) else self.texts
        return replace(self, tokens=self.tokens.to(device), texts=texts)


def backward(
    model: nn.Module,
    compare: Callable[[Outputs], Tensor],
    pieces: Sequence[MicroBatch],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    loss_scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Tensor, Outputs]:
    """Add the gradient of the loss over all pieces of all processes to the model's parameters.

    In several pieces, their embeddings are computed first, without a graph; the loss of all gives the embeddings'
    gradients, with which each piece is run again, forward and backward. That is the gradient of one piece, at
    the price of a second forward; no more than one piece's activations exist at a time.

    Args:
        model: an `HLIPModel`, or one wrapped by DDP or FSDP.
        compare: the loss of its objective.
        autocast: context in which the model runs.
        loss_scale: of fp16, by which gradients are multiplied.

    Returns:
        The loss, and the outputs of all pieces, both detached.

    Source: gradient caching (arXiv 2101.06983).
    """

    def forward(piece: MicroBatch) -> Outputs:
        torch.manual_seed(piece.seed)
        with autocast():
            return model(piece.tokens, piece.texts)

    if len(pieces) == 1:
        outputs = forward(pieces[0].to(device))
        loss = compare(outputs)
        loss_scale(loss).backward()
        return loss.detach(), detach(outputs)

    sharded = hasattr(model, "set_requires_gradient_sync")  # its weights are whole for one layer at a time
    with contextlib.nullcontext() if sharded else hold_weights():
        with torch.no_grad():
            encoded = [forward(piece.to(device)) for piece in pieces]
        sizes = [len(output.image) for output in encoded]
        image, text = torch.cat([output.image for output in encoded]), torch.cat([output.text for output in encoded])
        whole = Outputs(image, text, encoded[0].scale, encoded[0].bias)
        leaves = Outputs(*(rows if rows is None else rows.detach().requires_grad_() for rows in whole))  # type: ignore[arg-type]
        loss = compare(leaves)
        loss_scale(loss).backward()
        assert leaves.image.grad is not None and leaves.text.grad is not None
        grads = zip(leaves.image.grad.split(sizes), leaves.text.grad.split(sizes), strict=True)
        for i, (piece, (image_grad, text_grad)) in enumerate(zip(pieces, grads, strict=True)):
            last = i == len(pieces) - 1
            with synchronised(model, last):
                outputs = forward(piece.to(device))
                roots: list[tuple[Any, Any]] = [(outputs.image, image_grad), (outputs.text, text_grad)]
                if last:  # temperature and bias belong to all pieces
                    roots += [(outputs.scale, leaves.scale.grad)]
                    roots += [] if leaves.bias is None else [(outputs.bias, leaves.bias.grad)]
                roots = [(root, grad) for root, grad in roots if root.requires_grad]
                torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        return loss.detach(), detach(whole)


def detach(outputs: Outputs) -> Outputs:
    return Outputs(*(rows if rows is None else rows.detach() for rows in outputs))  # type: ignore[arg-type]


@contextlib.contextmanager
def synchronised(model: Any, last: bool) -> Iterator[None]:
    """Gradients are reduced over the processes with the last piece only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def start(config: TrainConfig) -> tuple[torch.device, Processes]:
    """Join the processes of the run, on the device of this one.

    Raises:
        ValueError: fewer GPUs than processes on this machine, or FSDP without processes.
    """
    if config.fsdp and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        raise ValueError("fsdp needs processes: start this with torchrun or srun")
    if config.fsdp and torch.__version__ < "2.7":  # fully_shard takes no ignored_params before
        raise ValueError(f"fsdp needs PyTorch 2.7 or newer, this is {torch.__version__}")
    device, world = join_on(config.device)
    if device.type == "cpu":
        keep_memory()
    return device, world


def wrap(model: HLIPModel, world: Processes, shard: bool) -> nn.Module:
    """The model as the run's processes share it: by DDP, or sharded by FSDP."""
    if shard:
        # A sharded scalar is no scalar: each process keeps temperature and bias whole.
        scalars = {p for p in model.parameters() if p.ndim == 0}
        for block in [*model.visual.trunk.blocks, *model.text.transformer.encoder.layer]:
            if any(p.requires_grad for p in block.parameters()):
                fully_shard(block)
        fully_shard(model, ignored_params=scalars)
        for name in ("encode_image", "encode_text"):
            register_fsdp_forward_method(model, name)
        return model
    if world.size > 1:
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # as it was called
        settings: dict[str, Any] = {name: False}
        return DistributedDataParallel(model, **settings)
    return model


def reduce_scalars(model: HLIPModel, world: Processes) -> None:
    """Average the gradients of what FSDP leaves whole."""
    if isinstance(model, FSDPModule) and world.size > 1:
        for parameter in model.parameters():
            if parameter.ndim == 0 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world.size


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A sharded model whole on every process, which then may run it without the others."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


class Optimizer:
    """AdamW on a schedule, with the loss scale of fp16 and a limit to the gradient's norm."""

    def __init__(self, model: HLIPModel, config: TrainConfig, steps: int, device: torch.device) -> None:
        self.model, self.config, self.steps = model, config, steps
        self.adamw = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.not_finite = 0  # fp16 steps in a row that the scaler left out

    def begin(self, step: int) -> float:
        """Forget the gradients of the step before. Returns the learning rate."""
        rate = learning_rate(self.config, step, self.steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.zero_grad(set_to_none=True)
        return rate

    def limit(self, world: Processes) -> float:
        """Limit the gradient's norm. Returns what it was."""
        reduce_scalars(self.model, world)
        self.scaler.unscale_(self.adamw)
        return clip_gradient(self.model, self.config.grad_clip)

    def is_spoilt(self, loss: Tensor, norm: float) -> bool:
        """Whether a step would spoil the weights. The scaler leaves some out, at which the gradient is not finite."""
        self.not_finite = 0 if math.isfinite(norm) else self.not_finite + 1
        return not math.isfinite(loss) or self.not_finite > (MOST_NOT_FINITE if self.scaler.is_enabled() else 0)

    def update(self) -> None:
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.model.objective.clamp(self.model)


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
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


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
