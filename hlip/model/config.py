"""What a model is made of: dataclasses, level patterns, named presets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from hlip_kernels import Grid, Level

from ..data.preprocess import BrainMRI

POSITIONS = {"tiled": 4, "sincos3d": 6}  # and what the width must be a multiple of
Head = Literal["token", "average", "dinotxt", "attention_pool"]
Pattern = Literal["slice", "scan", "study", "slice+scan", "scan+study", "slice+scan+study"]


def level_pattern(pattern: Pattern, depth: int, subsets: int = 4) -> tuple[Level, ...]:
    """The attention level of every layer.

    The layers are cut into `subsets` equal runs. Each run ends with the pattern's levels from fine to coarse,
    one layer each; what comes before attends at the finest level.

    >>> level_pattern("scan+study", 6, subsets=2)
    ('scan', 'scan', 'study', 'scan', 'scan', 'study')

    Raises:
        ValueError: unknown pattern, or a depth that does not divide into such runs.

    Source: HLIP (arXiv 2505.21862), section 3.1.
    """
    if pattern not in get_args(Pattern):
        raise ValueError(f"unknown level pattern {pattern!r}; there are {', '.join(get_args(Pattern))}")
    levels: list[Any] = pattern.split("+")
    if subsets < 1 or depth % subsets or depth // subsets < len(levels):
        raise ValueError(f"{depth} layers do not divide into {subsets} runs that hold the levels {pattern}")
    run = [levels[0]] * (depth // subsets - len(levels)) + levels
    return tuple(run * subsets)


@dataclass(frozen=True)
class VisionConfig:
    """The study encoder.

    patch_size: (pd, ph, pw) voxels of a token; grid: (d, h, w) tokens of the scan that positions are made for.
    levels: attention level of each layer; their number is the depth.
    num_prefix: prefix rows of a group: a cls token, then register tokens.
    head: what the encoder gives of a study's normalised rows. "token": its prefix rows; "dinotxt": each prefix row
        beside the mean of the patch rows, twice as wide; "average": the mean of the patch rows; "attention_pool": what
        a learned query attends to. The latter two need no prefix.
    max_scans: positions for the scans of a study; 0 for none.
    positions: "tiled" is a 2D sin-cos table over (h, w) plus a 1D one over d (MAE's, tiled over depth);
        "sincos3d" gives each of w, h and d a third of the width.
    patch_dropout, scan_dropout, drop_path: rates, in training only.
    """

    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    patch_size: Grid = (8, 16, 16)
    grid: Grid = (6, 14, 14)
    levels: tuple[Level, ...] = level_pattern("scan+study", 12)
    num_prefix: int = 1
    head: Head = "token"
    max_scans: int = 40
    positions: Literal["tiled", "sincos3d"] = "tiled"
    patch_dropout: float = 0.0
    scan_dropout: float = 0.0
    drop_path: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("patch_size", "grid"):
            value = getattr(self, name)
            if len(value) != 3 or not all(isinstance(n, int) and n >= 1 for n in value):
                raise ValueError(f"{name} must be three positive integers, got {value}")
        for name in ("width", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if not self.levels or set(self.levels) - set(get_args(Level)):
            raise ValueError(f"levels must be of {', '.join(get_args(Level))}, got {self.levels}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        divisor = POSITIONS[self.positions]
        if self.width % divisor:
            raise ValueError(f"positions {self.positions!r} need a width that is a multiple of {divisor}")
        if self.max_scans < 0:
            raise ValueError(f"max_scans must be 0 or more, got {self.max_scans}")
        if self.head not in get_args(Head):
            raise ValueError(f"head must be one of {', '.join(get_args(Head))}, got {self.head!r}")
        least = 1 if self.head in ("token", "dinotxt") else 0
        if self.num_prefix < least:
            raise ValueError(f"num_prefix must be at least {least} with head {self.head!r}, got {self.num_prefix}")
        for name in ("patch_dropout", "scan_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def num_outputs(self) -> int:
        """Rows that the encoder gives of a study."""
        return self.num_prefix if self.head in ("token", "dinotxt") else 1

    @property
    def num_features(self) -> int:
        """Width of those rows."""
        return 2 * self.width if self.head == "dinotxt" else self.width


@dataclass(frozen=True)
class TextConfig:
    """The text tower: any BERT that `transformers` reads.

    name: a folder, or a name on the Hugging Face hub.
    context_length: tokens of a text that are read.
    pooling: "cls" takes the first token of the last hidden state, "mean" the average over the text.
    locked: keep the transformer's weights fixed; its projection is trained all the same.
    """

    name: str = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
    context_length: int = 256
    pooling: Literal["cls", "mean"] = "cls"
    locked: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a saved model needs to be built and fed again."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    recipe: BrainMRI = field(default_factory=BrainMRI)
    embed_dim: int = 512

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelConfig:
        """Raises TypeError or ValueError where `content` is not what `to_dict` gives."""
        parts: dict[str, Any] = dict(content)
        for name, kind in {"vision": VisionConfig, "text": TextConfig, "recipe": BrainMRI}.items():
            fields = {key: tuple(value) if isinstance(value, list) else value for key, value in parts[name].items()}
            parts[name] = kind(**fields)
        return cls(**parts)


PRESETS: dict[str, ModelConfig] = {
    "clip_vit_base_scan_study_token1176": ModelConfig(VisionConfig(patch_dropout=0.25, drop_path=0.2)),
    "vit_base_multiscan_h2_token588": ModelConfig(
        VisionConfig(patch_size=(16, 16, 16), grid=(3, 14, 14), patch_dropout=0.25, drop_path=0.2)
    ),
    "vit_base_multiscan_h3_token1176": ModelConfig(
        VisionConfig(levels=level_pattern("slice+scan+study", 12), patch_dropout=0.25, drop_path=0.2)
    ),
    # Small enough to train on two CPU cores in minutes; the initial weights are about Xavier's.
    "demo": ModelConfig(
        VisionConfig(
            width=128,
            heads=4,
            patch_size=(6, 12, 12),
            grid=(4, 4, 4),
            levels=level_pattern("scan+study", 6, subsets=2),
            init_std=0.09,
        ),
        TextConfig(context_length=64, pooling="mean", locked=True),
        BrainMRI(size=(24, 55, 55), crop=(48, 48), percentiles=(0.5, 99.95)),  # keeps small bright lesions bright
        embed_dim=256,
    ),
}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`.

    Raises:
        ValueError: there is none; names the closest, or all.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(PRESETS)}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return PRESETS[name]


def list_models() -> list[str]:
    """Names for `create_model`."""
    return sorted(PRESETS)
