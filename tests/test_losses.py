"""The losses against their formulas, and shared out over processes against one process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import hlip
from conftest import random_study, tiny_vision
from hlip.model.config import ModelConfig, TextConfig
from hlip.model.encoder import StudyEncoder
from hlip.objective import OBJECTIVES, Clip, Dual, Outputs, SigLip


def unit(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def test_clip_loss_by_hand() -> None:
    image, text = unit(5, 1, 8, seed=0), unit(5, 1, 8, seed=1)
    logits = 7.0 * image[:, 0] @ text[:, 0].T
    by_hand = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    torch.testing.assert_close(Clip().loss(Outputs(image, text, torch.tensor([7.0]).double())), by_hand)


def test_dual_loss_is_the_mean_of_two_at_their_own_temperatures() -> None:
    image, text, scale = unit(5, 2, 8, seed=0), unit(5, 2, 8, seed=1), torch.tensor([7.0, 3.0]).double()
    parts = [Clip().loss(Outputs(image[:, [p]], text[:, [p]], scale[[p]])) for p in range(2)]
    torch.testing.assert_close(Dual().loss(Outputs(image, text, scale)), (parts[0] + parts[1]) / 2)
    assert not torch.allclose(parts[0], parts[1])


def test_siglip_loss_by_hand() -> None:
    image, text, bias = unit(4, 1, 8, seed=0), unit(4, 1, 8, seed=1), torch.tensor(-2.0).double()
    total = 0.0
    for i in range(4):
        for j in range(4):
            logit = 5.0 * float(image[i, 0] @ text[j, 0]) - 2.0
            total += math.log(1 + math.exp(-logit if i == j else logit))
    loss = SigLip().loss(Outputs(image, text, torch.tensor([5.0]).double(), bias))
    assert float(loss) == pytest.approx(total / 4, rel=1e-12)


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    image, text, scale = unit(5, 1, 8, seed=0).bfloat16(), unit(5, 1, 8, seed=1).bfloat16(), torch.tensor([50.0])
    loss = Clip().loss(Outputs(image, text, scale))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, Clip().loss(Outputs(image.float(), text.float(), scale)))


class Towers(nn.Module):
    """Small towers in float64, with what each objective compares."""

    def __init__(self, objective: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.objective = objective
        self.trunk = StudyEncoder(tiny_vision(num_prefix=2)).double().eval()
        self.text = nn.Linear(6, 48).double()
        self.scale = nn.Parameter(torch.tensor([10.0, 4.0], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))

    def forward(self, batch: hlip.PackedBatch, words: torch.Tensor) -> Outputs:
        pairs = 2 if self.objective == "dual" else 1
        image = F.normalize(self.trunk(batch)[:, :pairs], dim=-1)
        text = F.normalize(self.text(words)[:, :pairs], dim=-1)
        return Outputs(image, text, self.scale[:pairs], self.bias.clone() if self.objective == "siglip" else None)


def studies_and_words() -> tuple[list[list[torch.Tensor]], torch.Tensor]:
    studies = [random_study([(8, 16, 16)] * (1 + i % 3), i) for i in range(4)]  # 1, 2, 3 and 1 scans
    return studies, torch.randn(4, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def one_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    studies, words = studies_and_words()
    share = len(studies) // world
    mine = slice(share * rank, share * rank + share)
    found = {}
    for objective in OBJECTIVES:
        for local_loss in (False, True):
            model = nn.parallel.DistributedDataParallel(Towers(objective), find_unused_parameters=True)
            loss = OBJECTIVES[objective].loss(model(hlip.pack(studies[mine], (4, 8, 8)), words[mine]), local_loss)
            loss.backward()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            grads = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
            found[f"{objective} {local_loss}"] = grads | {"loss": mean / world}
    if rank == world - 1:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_have_the_loss_and_gradient_of_one(world: int, tmp_path: Path) -> None:
    mp.spawn(one_rank, (world, str(tmp_path)), nprocs=world)
    found = torch.load(tmp_path / "found", weights_only=True)
    studies, words = studies_and_words()
    for objective in OBJECTIVES:
        model = Towers(objective)
        loss = OBJECTIVES[objective].loss(model(hlip.pack(studies, (4, 8, 8)), words))
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert {"trunk.cls_token", "text.weight", "scale"} <= expected.keys()
        for local_loss in (False, True):
            shared = found[f"{objective} {local_loss}"]
            assert abs(shared.pop("loss") - loss.detach()) <= 1e-9
            assert shared.keys() - {"bias"} == expected.keys() - {"bias"}
            for name, grad in expected.items():
                assert (shared[name] - grad).abs().max() <= 1e-9 * max(1.0, float(grad.abs().max())), (objective, name)


def small(objective: str, bert_folder: str) -> hlip.HLIPModel:
    torch.manual_seed(0)
    config = ModelConfig(
        replace(tiny_vision(), num_prefix=2), TextConfig(bert_folder, context_length=16), None, embed_dim=32,
        per_prefix=objective == "dual", objective=objective,
    )  # fmt: skip
    return hlip.HLIPModel(config).eval()


def batch() -> hlip.PackedBatch:
    sections = [("a mass.", "edema around it."), ("", "clear."), ("normal.", "")]
    studies = [
        hlip.Study(f"s{i}", random_study([(8, 16, 16)] * (1 + i), i), [], *section)
        for i, section in enumerate(sections)
    ]
    return hlip.pack(studies, (4, 8, 8))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_compares_what_its_objective_says(objective: str, bert_folder: str) -> None:
    model = small(objective, bert_folder)
    packed = batch()
    outputs = model(packed, model.objective.texts(packed.impressions, packed.findings))
    reports = ["a mass. edema around it.", "clear.", "normal."]
    impressions, findings = ["a mass.", "clear.", "normal."], ["edema around it.", "clear.", "normal."]
    expected = [impressions, findings] if objective == "dual" else [reports]
    images = model.encode_image(packed)
    for pair, texts in enumerate(expected):
        torch.testing.assert_close(outputs.text[:, pair], model.encode_text(texts))
        torch.testing.assert_close(outputs.image[:, pair], images[:, pair] if objective == "dual" else images)
    assert outputs.scale.tolist() == pytest.approx(
        {"clip": [1 / 0.07], "siglip": [10.0], "dual": [1 / 0.07, 1 / 0.07]}[objective]
    )
    assert (outputs.bias is None) == (objective != "siglip")
    model.objective.loss(outputs).backward()
    assert model.logit_scale.grad is not None
    if objective != "clip":
        assert model.logit_bias.grad is not None


def test_clamping_leaves_the_bias_of_siglip_alone(bert_folder: str) -> None:
    for objective, bias in (("siglip", -10.0), ("dual", 0.0)):
        model = small(objective, bert_folder)
        with torch.no_grad():
            model.logit_scale.fill_(9.0)
            model.logit_bias.fill_(-10.0)
        model.objective.clamp(model)
        assert (model.logit_scale.item(), model.logit_bias.item()) == (pytest.approx(math.log(100)), bias)
