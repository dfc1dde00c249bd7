"""A step in pieces against a step in one, on one process and on several."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import hlip
from conftest import random_study, tiny_vision
from hlip.model.config import ModelConfig, TextConfig
from hlip.processes import join_on, processes
from hlip.train.step import MicroBatch, backward

CPU = torch.device("cpu")
OBJECTIVES = ("clip", "siglip", "dual")
SCANS = (1, 4, 2, 1, 3, 2, 5, 1)


def make_model(objective: str, bert_folder: str, drop_path: float = 0.0) -> hlip.HLIPModel:
    torch.manual_seed(0)
    config = ModelConfig(
        replace(tiny_vision(), num_prefix=2, drop_path=drop_path), TextConfig(bert_folder, context_length=16), None,
        embed_dim=32, per_prefix=objective == "dual", objective=objective,
    )  # fmt: skip
    return hlip.HLIPModel(config).double().train()


def micro_batch(model: hlip.HLIPModel, studies: Sequence[int], seed: int = 0) -> MicroBatch:
    """Some of the eight studies. Their reports come as features, which do not depend on how texts are padded."""
    packed = hlip.pack([random_study([(8, 16, 16)] * SCANS[i], i) for i in studies], (4, 8, 8))
    pairs = 2 if model.config.objective == "dual" else 1
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(pairs, len(SCANS), model.text.proj.in_features, dtype=torch.float64, generator=generator)
    model.visual.trunk.eval()  # positions in order
    tokens = model.visual.trunk.plan(packed)
    model.visual.trunk.train()
    return MicroBatch(tokens, features[:, list(studies)].flatten(0, 1), [f"s{i}" for i in studies], seed)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-9 * max(1.0, float(grad.abs().max())), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pieces_have_the_loss_and_gradient_of_the_whole(objective: str, bert_folder: str) -> None:
    whole, cut = (make_model(objective, bert_folder) for _ in range(2))
    loss, outputs = backward(whole, whole.objective.loss, [micro_batch(whole, range(8))], CPU)
    pieces = [micro_batch(cut, studies) for studies in ([1], [0, 2, 3], [4, 5, 6, 7])]
    loss_cut, _ = backward(cut, cut.objective.loss, [pieces[1], pieces[0], pieces[2]], CPU)
    assert abs(loss - loss_cut) <= 1e-9
    assert {"logit_scale", "visual.trunk.cls_token", "text.proj.weight"} <= gradients(whole).keys()
    assert_close(gradients(cut), gradients(whole))
    assert outputs.image.shape == (8, 2 if objective == "dual" else 1, 32)


def test_both_passes_drop_the_same(bert_folder: str) -> None:
    """With stochastic depth the gradient is that of the loss which was reported: against finite differences."""
    model = make_model("clip", bert_folder, drop_path=0.5)
    pieces = [micro_batch(model, studies, seed=7 + i) for i, studies in enumerate(([0, 1], [2, 3], [4]))]
    loss, _ = backward(model, model.objective.loss, pieces, CPU)
    again, _ = backward(model, model.objective.loss, pieces, CPU)
    assert torch.equal(loss, again)
    other, _ = backward(model, model.objective.loss, [replace(piece, seed=piece.seed + 9) for piece in pieces], CPU)
    assert not torch.equal(loss, other)
    model.zero_grad()
    backward(model, model.objective.loss, pieces, CPU)
    bias = model.visual.trunk.blocks[1].mlp.fc1.bias
    assert bias.grad is not None
    place = int(bias.grad.abs().argmax())
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            bias[place] += step
        ends.append(backward(model, model.objective.loss, pieces, CPU)[0])
        with torch.no_grad():
            bias[place] -= step
    model.zero_grad()
    backward(model, model.objective.loss, pieces, CPU)
    assert float(bias.grad[place]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4)


def test_only_one_piece_is_kept_for_backward(bert_folder: str) -> None:
    """What autograd keeps at a time depends on the piece, not on how many there are."""
    model = make_model("clip", bert_folder)
    most: dict[int, int] = {}
    for count in (2, 4, 8):
        pieces = [micro_batch(model, [0]) for _ in range(count)]
        alive = peak = 0

        class Kept:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal alive, peak
                self.tensor = tensor
                alive += tensor.numel()
                peak = max(peak, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            backward(model, model.objective.loss, pieces, CPU)
        most[count] = peak
    assert most[8] <= 1.1 * most[2]


def one_rank(rank: int, world: int, folder: str, bert_folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    counts = {2: [3, 5], 4: [1, 2, 2, 3]}[world]
    mine = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
    cuts = [mine] if len(mine) == 1 else [mine[:1], mine[1:]] if len(mine) < 5 else [mine[:1], mine[1:2], mine[2:]]
    found = {}
    for objective in OBJECTIVES:
        for local_loss in (False, True):
            model = make_model(objective, bert_folder)
            model.text.transformer.requires_grad_(False)
            wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
            loss, _ = backward(
                wrapped,
                functools.partial(model.objective.loss, local_loss=local_loss, counts=counts),
                [micro_batch(model, cut) for cut in cuts],
                CPU,
            )
            dist.all_reduce(loss)
            found[f"{objective} {local_loss}"] = gradients(model) | {"loss": loss / world}
    if rank == world - 1:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_pieces_of_processes_have_the_gradient_of_the_whole(world: int, tmp_path: Path, bert_folder: str) -> None:
    """Ranks may have different numbers of studies, cut into different numbers of pieces."""
    mp.spawn(one_rank, (world, str(tmp_path), bert_folder), nprocs=world)
    found = torch.load(tmp_path / "found", weights_only=True)
    for objective in OBJECTIVES:
        whole = make_model(objective, bert_folder)
        loss, _ = backward(whole, whole.objective.loss, [micro_batch(whole, range(8))], CPU)
        for local_loss in (False, True):
            shared = found[f"{objective} {local_loss}"]
            assert abs(shared.pop("loss") - loss) <= 1e-9
            assert_close(shared, gradients(whole))


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "100")
    with pytest.raises(ValueError, match="'cuda': this process wants cuda:100, and PyTorch sees"):
        join_on("cuda")


def test_a_process_alone_asks_for_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="RANK is set without the other of RANK and WORLD_SIZE"), processes():
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes() as among:
        assert (among.rank, among.size, dist.is_initialized()) == (0, 1, False)
