"""The processes of a run, the model they share, and one step's gradient in as many pieces as memory asks for."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from hlip_kernels import hold_weights

from ..model.clip import HLIPModel
from ..model.losses import Outputs, contrastive_loss
from ..model.plan import TokenBatch


@dataclass
class MicroBatch:
    """What the model reads at once.

    texts: of its studies, as `ModelConfig.texts` gives them; or their features.
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
    pieces: Sequence[MicroBatch],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    local_loss: bool = False,
    counts: Sequence[int] | None = None,
    loss_scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Tensor, Outputs]:
    """Add the gradient of the loss over all pieces of all processes to the model's parameters.

    In several pieces, their embeddings are computed first, without a graph; the loss of all gives the embeddings'
    gradients, with which each piece is run again, forward and backward. That is the gradient of one piece, at
    the price of a second forward; no more than one piece's activations exist at a time.

    Args:
        model: an `HLIPModel`, or one wrapped by DDP or FSDP.
        autocast: context in which the model runs.
        local_loss, counts: see `contrastive_loss`.
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
        loss = contrastive_loss(outputs, local_loss, counts)
        loss_scale(loss).backward()
        return loss.detach(), detach(outputs)

    sharded = hasattr(model, "set_requires_gradient_sync")  # its weights are whole for one layer at a time
    with contextlib.nullcontext() if sharded else hold_weights():
        with torch.no_grad():
            parts = [forward(piece.to(device)) for piece in pieces]
        sizes = [len(part.image) for part in parts]
        image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
        whole = Outputs(image, text, parts[0].scale, parts[0].bias)
        leaves = Outputs(*(each if each is None else each.detach().requires_grad_() for each in whole))  # type: ignore[arg-type]
        loss = contrastive_loss(leaves, local_loss, counts)
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
    return Outputs(*(each if each is None else each.detach() for each in outputs))  # type: ignore[arg-type]


@contextlib.contextmanager
def synchronised(model: Any, last: bool) -> Iterator[None]:
    """Gradients are reduced over the processes with the last piece only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    yield


class World:
    """The processes of the run. What is agreed on goes over a group of its own, whose waits may last for days."""

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

    def any(self, *values: bool) -> tuple[bool, ...]:
        """Whether each is so on any process."""
        if self.size == 1:
            return values
        flags = torch.tensor([int(value) for value in values])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return tuple(flag > 0 for flag in flags.tolist())


def start(device: str) -> tuple[torch.device, World]:
    """Join the processes that torchrun or Slurm's srun started, with NCCL on GPUs and gloo on CPUs.

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
        if place.index >= (found := torch.cuda.device_count()):
            raise ValueError(f"device {device!r}: this process wants {place}, and PyTorch sees {found} GPUs")
        torch.cuda.set_device(place)
    if "RANK" in environment:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return place, World()


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: of "gpu[03-05,9],login" it is gpu03."""
    name, bracket, rest = nodes.partition(",")[0].partition("[")
    return name + re.split("[],-]", rest)[0] if bracket else name


def wrap(model: HLIPModel, world: World, shard: bool) -> nn.Module:
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


def reduce_scalars(model: HLIPModel, world: World) -> None:
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
