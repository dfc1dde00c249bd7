"""The released models' layout: which model a file of weights is, and the JSON files that lie beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hlip_kernels import Grid

from ..objective import OBJECTIVES, Clip
from ..read.safe import hint
from .config import ALIASES, MODELS, PUBMED_BERT, ModelConfig, preset, spelled
from .positions import POSITIONS, Rope
from .weights import Weights, read_json

OPEN_CLIP_CONFIG = "open_clip_config.json"
CONFIGS = "hlip/model_configs"
POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}
# The name under which the release registers a model, where ours is another.
REGISTERED = {"hlip-2025_10_08": "ablate_seqposemb_clip_vit_base_multiscan_h2_dinotxt1568"}


class Shapes(NamedTuple):
    """The architecture that shapes of weights tell. max_scans of 1 counts as 0: one row is added to every token."""

    width: int
    depth: int
    patch_size: Grid
    grid: Grid
    num_prefix: int
    max_scans: int
    head: str
    embed_dim: int

    @classmethod
    def of_config(cls, config: ModelConfig) -> Shapes:
        v = config.vision
        scans = v.max_scans if v.max_scans > 1 else 0
        return cls(v.width, len(v.levels), v.patch_size, v.grid, v.num_prefix, scans, v.head, config.embed_dim)

    @classmethod
    def of_weights(cls, weights: Weights) -> Shapes:
        """Raises ValueError, naming the file and a key, where they are of another architecture."""
        trunk = {k.removeprefix("visual.trunk."): v for k, v in weights.state.items() if k.startswith("visual.trunk.")}
        for key, ndim in {"patch_embed.proj.weight": 5, "spatial_posemb": 5, "norm.weight": 1}.items():
            table = trunk.get(key)
            if table is None or table.ndim != ndim:
                what = f"no visual.trunk.{key}" if table is None else f"visual.trunk.{key} is {tuple(table.shape)}"
                hint = "; a 2D ViT is for create_model's pretrained_vision" * ("pos_embed" in weights.state)
                raise ValueError(f"{weights.path}: weights of another architecture: {what}{hint}")
        width = len(trunk["norm.weight"])
        depth = len({key.split(".")[1] for key in trunk if key.startswith("blocks.")})
        prefix = sum(trunk[key].shape[1] for key in ("cls_token", "reg_token") if key in trunk and trunk[key].ndim == 3)
        sequence = trunk.get("sequential_posemb")
        scans = sequence.shape[1] if sequence is not None and sequence.ndim == 3 and sequence.shape[1] > 1 else 0
        proj = weights.state.get("visual.head.proj.weight")
        text = weights.state.get("text.proj.weight")
        head = "token" if proj is None or proj.ndim != 2 or proj.shape[1] == width else "dinotxt"
        head = "attention_pool" if "attn_pool.latent" in trunk else head
        embed_dim = len(proj) if proj is not None and proj.ndim else len(text) if text is not None and text.ndim else 0
        patch, grid = trunk["patch_embed.proj.weight"].shape[2:], trunk["spatial_posemb"].shape[1:4]
        return cls(
            width, depth, (patch[0], patch[1], patch[2]), (grid[0], grid[1], grid[2]), prefix, scans, head, embed_dim
        )

    def __str__(self) -> str:
        plain = {key: " x ".join(map(str, v)) if isinstance(v, tuple) else v for key, v in self._asdict().items()}
        return ", ".join(f"{key} {value}" for key, value in plain.items())


def names() -> list[str]:
    """Released models, old spellings last."""
    return [name for name in (*MODELS, *ALIASES) if name != "demo"]


class Identity(NamedTuple):
    """A configuration, how it is known in words, and whether it is only guessed, from shapes or the run's name."""

    config: ModelConfig
    how: str
    guessed: bool = False


def identify(weights: Weights, folder: Path | None, model: str | None) -> Identity:
    """The configuration of published weights.

    The first of these that says: `model`; the JSON files of `folder`; the training run's name; the shapes.

    Raises:
        ValueError: another architecture, or several models that fit; names the file and those models.
    """
    shapes = Shapes.of_weights(weights)
    embed_dim = shapes.embed_dim  # it differs between releases of one model, and says nothing of the levels
    fitting = [name for name in names() if Shapes.of_config(preset(name))._replace(embed_dim=embed_dim) == shapes]
    models = [name for name in fitting if name in MODELS]  # each by one of its names
    files = _json_files(folder) if folder else {}
    inside = [name for name in files if name in fitting]
    told = spelled(model or "") or (
        weights.name if weights.name in MODELS else ""
    )  # by a checkpoint of our own trainer
    called, path, guessed = told, files.get(told), False
    if told:
        how = f"{told}, as told"
    elif len(files) > 1 and len(_families(inside)) == 1:
        path = files[inside[0]]
        how = f"{inside[0]}, the only one of {path.parent} that fits"
    elif len(files) == 1:
        (path,) = files.values()
        how = f"as {path} says"
    elif called := _in_run_name(weights.name, fitting):
        how, guessed = f"{called}, as the training run was called {weights.name!r}", True
    elif (called := spelled(weights.path.stem)) in fitting:
        how, guessed = f"{called}, as the file is called", True
    elif not fitting:
        raise ValueError(
            f"{weights.path}: fits no released model: {shapes}; if it has the levels of one, name it with "
            f"model= or --model: {', '.join(name for name in names() if name in MODELS)}"
        )
    elif len(_families(fitting)) > 1:
        raise ValueError(
            f"{weights.path}: fits {' and '.join(models)}, which differ in what weights do not tell: choose with "
            "model= or --model"
        )
    else:
        rest = (
            f" ({', '.join(models[1:])} fits too: name it with model= or --model if it is that)" if models[1:] else ""
        )
        called, how, guessed = fitting[0], f"{fitting[0]}, guessed from its shapes{rest}", True
    config = config_of_json(path, read_json(path)) if path else preset(called)
    if config.projection and embed_dim:
        config = replace(config, embed_dim=embed_dim)
    sequence = weights.state.get("visual.trunk.sequential_posemb")
    if config.vision.max_scans == 0 and sequence is not None and sequence.shape[1:2] == (1,):
        config = replace(config, vision=replace(config.vision, max_scans=1))
        how += "; its one scan position is added to every token"
    return Identity(config, how, guessed)


def describe(config: ModelConfig) -> list[str]:
    """A configuration in a few lines, for people."""
    vision, text = config.vision, config.text
    rows = "one per output" if config.per_prefix else "one a study"
    return [
        f"vision: {Shapes.of_config(config)._replace(max_scans=vision.max_scans)}, heads {vision.heads}",
        f"levels: {' '.join(vision.levels)}",
        f"text: {text.name}, {text.context_length} tokens, pooling {text.pooling}{', locked' * text.locked}",
        f"embedding: {config.embed_dim}, {rows}; objective {config.objective}",
    ]


def _families(models: list[str]) -> set[tuple[Any, ...]]:
    """Models apart from what only a caller notices: the number of embeddings that they give."""
    return {(preset(name).vision.levels, preset(name).objective) for name in models}


def _json_files(folder: Path) -> dict[str, Path]:
    """The JSON files that say what lies in a folder; by name of the model, or of the file."""
    if (folder / OPEN_CLIP_CONFIG).is_file() and not (folder / CONFIGS).is_dir():
        return {OPEN_CLIP_CONFIG: folder / OPEN_CLIP_CONFIG}
    return {path.stem: path for path in sorted((folder / CONFIGS).glob("*.json"))}


def _spelling(name: str) -> str:
    """A name without what changed over the releases."""
    for old, new in {
        "siglip_": "", "clip_": "",
        "singlescan_h2": "slice_scan", "multiscan_h2": "scan_study", "multiscan_h3": "slice_scan_study",
    }.items():  # fmt: skip
        name = name.replace(old, new)
    return name


def config_of_json(path: Path, content: Mapping[str, Any]) -> ModelConfig:
    """The configuration that an open_clip JSON file describes. Its levels are those of the model it names.

    Raises:
        ValueError: it names no model that is known here, or lacks a field; names the file.
    """
    try:
        content = content.get("model_cfg", content)
        vision, text = content["vision_cfg"], content["text_cfg"]
        trunk, pooled = str(vision["timm_model_name"]), vision.get("timm_pool") == "map"
        embed_dim, context = int(content["embed_dim"]), int(text["context_length"])
        pooling: Any = {label: key for key, label in POOLERS.items()}[text.get("hf_pooler_type", POOLERS["cls"])]
        tokenizer = str(text.get("hf_tokenizer_name") or text["hf_model_name"])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not a configuration of open_clip ({type(error).__name__} {error})") from error
    config = preset(path.stem if path.stem in names() else _of_trunk(path, trunk, pooled))
    try:
        texts = replace(config.text, name=tokenizer, context_length=context, pooling=pooling)
        return replace(config, embed_dim=embed_dim, text=texts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _in_run_name(run: str, fitting: list[str]) -> str:
    """The model that a training run is called after, in any spelling; empty if it is none."""
    for spelling in (str, _spelling):
        called = [(name, rf"(?<![a-z0-9]){re.escape(spelling(name))}(?![a-z0-9])") for name in fitting]
        likely = [name for name, pattern in called if re.search(pattern, spelling(run))]
        if likely:
            return max(likely, key=len)
    return ""


def _of_trunk(path: Path, trunk: str, pooled: bool) -> str:
    known = [name for name in names() if (preset(name).vision.head == "attention_pool") == pooled]
    same = [name for name in known if _spelling(name) == _spelling(trunk)]
    if not same:
        raise ValueError(f"{path}: unknown model {trunk!r}{hint(trunk, known)}")
    return min(
        same, key=lambda name: trunk not in (name, name.replace("clip_", "", 1))
    )  # another spelling is of another release


def published_name(config: ModelConfig, name: str | None = None) -> str:
    """The released model whose architecture `config` has; checked if it is given.

    Raises:
        ValueError: none, or not the one named; says what differs.
    """

    def architecture(model: ModelConfig) -> dict[str, Any]:
        vision = model.vision
        return {
            **Shapes.of_config(model)._asdict(),
            "levels": vision.levels, "heads": vision.heads, "mlp_ratio": vision.mlp_ratio,
            "objective": model.objective, "projection": model.projection,
            "rotary positions": isinstance(POSITIONS[vision.positions], Rope),
        }  # fmt: skip

    own = architecture(config)
    if name is not None:
        name = spelled(name)
        wrong = [f"{key} is {own[key]}, not {v}" for key, v in architecture(preset(name)).items() if own[key] != v]
        if wrong:
            raise ValueError(f"the model is no {name}: {'; '.join(wrong)}")
        return name
    same = [other for other in names() if architecture(preset(other)) == own]
    if not same:
        raise ValueError("the model has the architecture of no released one, so others could not load it")
    return next((other for other in same if preset(other).per_prefix == config.per_prefix), same[0])


def open_clip_json(config: ModelConfig, name: str) -> tuple[str, dict[str, Any]]:
    """The name that the release registers, and the JSON with which open_clip builds the model."""
    name = REGISTERED.get(name, name)
    tokenizer = config.text.name if not Path(config.text.name).is_dir() else preset(name).text.name
    trunk = re.sub(r"^(ablate_[a-z]+_)?(siglip_|clip_)", r"\1", name)
    content: dict[str, Any] = {"embed_dim": config.embed_dim}
    begin = OBJECTIVES[config.objective].begin
    content |= {f"init_{key}": value for key, value in begin.items() if value != Clip.begin.get(key)}
    content["vision_cfg"] = {
        "timm_model_name": trunk,
        "timm_model_pretrained": False,
        "timm_drop_path": config.vision.drop_path,
        "timm_pool": "map" if config.vision.head == "attention_pool" else "token",
        "timm_proj": "linear" if config.projection else "none",
    }
    content["text_cfg"] = {
        "hf_model_name": PUBMED_BERT,  # the architecture: CXR-BERT's is the same, but its own class is remote code
        "hf_tokenizer_name": tokenizer,
        "hf_pooler_type": POOLERS[config.text.pooling],
        "hf_proj_type": "linear",
        "context_length": config.text.context_length,
    }
    return name, content
