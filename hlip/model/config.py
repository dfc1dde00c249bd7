"""The configuration of a model: dataclasses, level patterns, named presets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hlip_kernels import Grid, Level

from ..objective import OBJECTIVES, ObjectiveName
from ..prepare.recipe import RECIPES, Recipe
from ..read.safe import hint
from ..read.schema import check_ranges, check_types, structure
from .levels import Pattern, level_pattern
from .positions import POSITIONS, PositionsName, Rope

Head = Literal["token", "average", "weighted_average", "dinotxt", "attention_pool"]


@dataclass(frozen=True)
class VisionConfig:
    """The study encoder.

    patch_size: (pd, ph, pw) voxels of a token; grid: (d, h, w) tokens of the scan that positions are made for.
    levels: attention level of each layer; their number is the depth.
    num_prefix: prefix rows of a group: a cls token, then register tokens.
    head: what the encoder gives of a study's normalised rows. "token": its prefix rows; "dinotxt": each prefix row
        beside the mean of the patch rows, twice as wide; "average": the mean of the patch rows; "weighted_average":
        the same, weighted by a learned score; "attention_pool": what a learned query attends to among them. The
        latter three need no prefix.
    max_scans: positions for the scans of a study; 0 for none.
    positions: of a scan's patches, a name in `hlip.model.positions.POSITIONS`.
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
    positions: PositionsName = "tiled"
    patch_dropout: float = 0.0
    scan_dropout: float = 0.0
    drop_path: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(
            self,
            {
                "above 0": ("width", "heads", "patch_size", "grid", "mlp_ratio", "init_std"),
                "0 or more": ("max_scans",),
                "in [0, 1)": ("patch_dropout", "scan_dropout", "drop_path"),
            },
        )
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        if not self.levels:
            raise ValueError("levels must name the level of one layer at least")
        divisor = POSITIONS[self.positions].divisor
        if isinstance(POSITIONS[self.positions], Rope) and self.width < 6 * self.heads:
            raise ValueError(f"positions {self.positions!r} need a width of 6 or more for each of {self.heads} heads")
        if self.width % divisor:
            raise ValueError(f"positions {self.positions!r} need a width that is a multiple of {divisor}")
        least = 1 if self.head in ("token", "dinotxt") else 0
        if self.num_prefix < least:
            raise ValueError(f"num_prefix must be at least {least} with head {self.head!r}, got {self.num_prefix}")

    @property
    def num_outputs(self) -> int:
        """Rows that the encoder gives of a study."""
        return self.num_prefix if self.head in ("token", "dinotxt") else 1

    @property
    def num_features(self) -> int:
        """Width of those rows."""
        return 2 * self.width if self.head == "dinotxt" else self.width


# What a BERT is built of where no pretrained one is read: PubMedBERT and CXR-BERT are both of BERT's base size.
BERT_BASE: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
_LATER = ("train_norms", "locked_dropout", "clean")  # a file that lacks one means that it is false
PUBMED_BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext"
CXR_BERT = "microsoft/BiomedVLP-CXR-BERT-specialized"


@dataclass(frozen=True)
class TextConfig:
    """The text tower: a BERT.

    name: a folder, or a name on the Hugging Face hub, of its tokenizer and its pretrained weights.
    context_length: tokens of a text that are read.
    pooling: "cls" takes the first token of the last hidden state, "mean" the average over the text.
    locked: keep the transformer's weights fixed; its projection is trained all the same.
    unlocked_layers: if it is locked, the last n of embeddings and layers are trained nevertheless.
    train_norms: if it is locked, its LayerNorms are trained nevertheless.
    locked_dropout: if it is locked, its dropout is on in training nevertheless.
    clean: mend wrongly decoded characters of texts, decode HTML's, and make white space single; see `clean_text`.
    """

    name: str = PUBMED_BERT
    context_length: int = 256
    pooling: Literal["cls", "mean"] = "cls"
    locked: bool = False
    unlocked_layers: int = 0
    train_norms: bool = False
    locked_dropout: bool = False
    clean: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, {"above 0": ("context_length",), "0 or more": ("unlocked_layers",)})


@dataclass(frozen=True)
class ModelConfig:
    """Everything that a saved model needs to be built and fed again.

    recipe: how scans are preprocessed; None if the package has no recipe for the model's data.
    embed_dim: E, width of the shared embedding.
    projection: project the encoder's output to it; without, the encoder's width is E.
    per_prefix: image embeddings are (B, P, E), one for each of the encoder's outputs; else (B, E), of the first.
    objective: what it learns by, a name in `hlip.objective.OBJECTIVES`.

    Source: HLIP (arXiv 2505.21862) and its released models.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    recipe: Recipe | None = field(default_factory=Recipe)
    embed_dim: int = 512
    projection: bool = True
    per_prefix: bool = False
    objective: ObjectiveName = "clip"

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, {"above 0": ("embed_dim",)})
        pairs = OBJECTIVES[self.objective].pairs
        if pairs > 1 and (self.vision.num_outputs < pairs or not self.per_prefix):
            raise ValueError(f"objective {self.objective!r} needs per_prefix and an encoder with {pairs} outputs")
        if not self.projection and self.vision.num_features != self.embed_dim:
            raise ValueError(
                f"without a projection embed_dim must be the encoder's {self.vision.num_features}, got {self.embed_dim}"
            )

    @property
    def preprocess(self) -> Recipe:
        """The recipe.

        Raises:
            ValueError: the package has none for this model's data.
        """
        if self.recipe is None:
            raise ValueError(
                f"no recipe makes scans of {self.vision.grid} patches of {self.vision.patch_size} voxels from image "
                "files yet: give such scans to hlip.pack"
            )
        return self.recipe

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self) | {"recipe": self.recipe and self.recipe.to_dict()}
        for name in _LATER:
            if not content["text"][name]:
                del content["text"][name]
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelConfig:
        """Raises ValueError where `content` is not what `to_dict` gives; names the field."""
        if isinstance(content, Mapping) and "recipe" not in content:
            raise ValueError("recipe: is missing")  # which of its defaults it would be, nothing says
        return structure(cls, content)


def _published(
    pattern: Pattern,
    patch_size: Grid,
    grid: Grid,
    advice: str,
    *,
    size: Literal["base", "large"] = "base",
    text: TextConfig | None = None,
    embed_dim: int = 512,
    projection: bool = True,
    per_prefix: bool = True,
    patch_dropout: float = 0.25,
    objective: str = "clip",
    **vision: Any,
) -> tuple[ModelConfig, str]:
    """A released model and for whom it is. Models of the first release give one embedding a study, later ones one for
    each prefix row."""
    width, heads, depth = {"base": (768, 12, 12), "large": (1024, 16, 24)}[size]
    shape = tuple(g * p for g, p in zip(grid, patch_size, strict=True))
    return ModelConfig(
        VisionConfig(
            width, heads, patch_size=patch_size, grid=grid, levels=level_pattern(pattern, depth),
            patch_dropout=patch_dropout, drop_path=0.2, **vision,
        ),
        replace(text or TextConfig(), clean=True),
        # Head CT's recipe makes scans of the same shape as brain MRI's, which comes first.
        next((recipe for recipe in RECIPES.values() if recipe.shape == shape), None),
        embed_dim=embed_dim,
        projection=projection,
        per_prefix=per_prefix,
        objective=objective,
    ), advice  # fmt: skip


_CHEST_TEXT = TextConfig(CXR_BERT, context_length=512, locked=True)
_CHEST: dict[str, Any] = {"patch_size": (8, 24, 24), "grid": (14, 14, 14), "text": _CHEST_TEXT, "patch_dropout": 0.0}
_HEAD: dict[str, Any] = {
    "patch_size": (6, 16, 16), "grid": (8, 14, 14), "head": "dinotxt", "max_scans": 0, "embed_dim": 768,
    "patch_dropout": 0.5,
}  # fmt: skip
_DUAL: dict[str, Any] = {**_HEAD, "num_prefix": 2, "objective": "dual"}

_TWO_HEADS = "brain MRI and head CT, any number of scans, impression and findings apart; PubMedBERT"

# Names, configurations, and for whom they are.
MODELS: dict[str, tuple[ModelConfig, str]] = {
    "clip_vit_base_slice_scan_token2744": _published(
        "slice+scan", max_scans=0, advice="chest CT, one scan a study; CXR-BERT, locked", **_CHEST
    ),
    "clip_vit_base_scan_study_token1176": _published(
        "scan+study", (8, 16, 16), (6, 14, 14), "brain MRI or head CT, up to 40 scans a study; PubMedBERT"
    ),
    "vit_base_multiscan_h2_token588": _published(
        "scan+study", (16, 16, 16), (3, 14, 14), "brain MRI or head CT, up to 40 scans, half the tokens; PubMedBERT",
        per_prefix=False,
    ),
    "vit_base_multiscan_h3_token1176": _published(
        "slice+scan+study", (8, 16, 16), (6, 14, 14), "brain MRI or head CT, up to 40 scans, three levels; PubMedBERT",
        per_prefix=False,
    ),
    "hlip-2025_10_08": _published(
        "scan+study", advice="brain MRI and head CT, any number of scans; PubMedBERT", **_HEAD
    ),
    "clip_vit_base_scan_study_dualdinotxt1568": _published(
        "scan+study", advice=_TWO_HEADS, **_DUAL
    ),
    "clip_vit_base_slice_scan_study_dualdinotxt1568": _published(
        "slice+scan+study", advice=f"{_TWO_HEADS}; three levels", **_DUAL
    ),
    "clip_vit_large_scan_study_dualdinotxt1568": _published(
        "scan+study", advice=f"{_TWO_HEADS}; ViT-L", size="large", **_DUAL
    ),
    "clip_vit_large_slice_scan_study_dualdinotxt1568": _published(
        "slice+scan+study",
        advice=f"{_TWO_HEADS}; ViT-L, three levels",
        size="large",
        **_DUAL,
    ),
    "clip_vit_base_slice_scan_dualdinotxt2744": _published(
        "slice+scan", max_scans=0, advice="chest CT, one scan a study, impression and findings apart; CXR-BERT, locked",
        head="dinotxt", num_prefix=2, embed_dim=768, objective="dual", **_CHEST,
    ),
    "siglip_vit_base_singlescan_h2_token2744": _published(
        "slice+scan", max_scans=0, advice="chest CT, one scan a study, SigLIP with attention pooling; CXR-BERT, locked",
        head="attention_pool", embed_dim=768, projection=False, per_prefix=False, objective="siglip", **_CHEST,
    ),
    # Of the release's branch of ablations.
    "ablate_rope_clip_vit_base_multiscan_h2_dinotxt1568": _published(
        "scan+study", advice="as hlip-2025_10_08, and rotary positions beside the added ones; PubMedBERT",
        positions="rope", **_HEAD,
    ),
    "clip_vit_base_multiscan_h2_token1568": _published(
        "scan+study", (6, 16, 16), (8, 14, 14), "brain MRI and head CT, up to 40 scans, smaller patches; PubMedBERT",
        patch_dropout=0.5,
    ),
    "clip_vit_base_multiscan_h2_dinotxt1176": _published(
        "scan+study", (8, 16, 16), (6, 14, 14), "brain MRI and head CT, up to 40 scans, the patches' mean; PubMedBERT",
        head="dinotxt", embed_dim=768, patch_dropout=0.5,
    ),
    "clip_vit_base_multiscan_h2_dinotxt1568": _published(
        "scan+study", (6, 16, 16), (8, 14, 14),
        "brain MRI and head CT, up to 40 scans, the patches' mean, smaller patches; PubMedBERT",
        head="dinotxt", embed_dim=768, patch_dropout=0.5,
    ),
    # Small enough to train on two CPU cores in minutes; the initial weights are about Xavier's.
    "demo": (
        ModelConfig(
            VisionConfig(
                width=128,
                heads=4,
                patch_size=(6, 12, 12),
                grid=(4, 4, 4),
                levels=level_pattern("scan+study", 6, subsets=2),
                init_std=0.09,
            ),
            TextConfig(context_length=64, pooling="mean", locked=True),
            Recipe(size=(24, 55, 55), crop=(48, 48), percentiles=(0.5, 99.95)),  # keeps small bright lesions bright
            embed_dim=256,
        ),
        "the demo: small synthetic brain MRI; any BERT",
    ),
}  # fmt: skip
# Other names of those models, of other releases.
ALIASES: dict[str, str] = {
    "vit_base_singlescan_h2_token2744": "clip_vit_base_slice_scan_token2744",
    "vit_base_multiscan_h2_token1176": "clip_vit_base_scan_study_token1176",
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dinotxt1568": "hlip-2025_10_08",
    "clip_vit_base_singlescan_h2_token2744": "clip_vit_base_slice_scan_token2744",
    "clip_vit_base_multiscan_h2_token1176": "clip_vit_base_scan_study_token1176",
    "clip_vit_base_multiscan_h2_token588": "vit_base_multiscan_h2_token588",
    "clip_vit_base_multiscan_h3_token1176": "vit_base_multiscan_h3_token1176",
    "ablate_seqposemb_clip_vit_base_multiscan_h2_dualdinotxt1568": "clip_vit_base_scan_study_dualdinotxt1568",
    "ablate_seqposemb_clip_vit_base_multiscan_h3_dualdinotxt1568": "clip_vit_base_slice_scan_study_dualdinotxt1568",
    "ablate_seqposemb_clip_vit_large_multiscan_h2_dualdinotxt1568": "clip_vit_large_scan_study_dualdinotxt1568",
    "ablate_seqposemb_clip_vit_large_multiscan_h3_dualdinotxt1568": "clip_vit_large_slice_scan_study_dualdinotxt1568",
}
# Those under which the model gave one embedding a study, where it now gives one for each prefix row.
ONE_EMBEDDING = frozenset(
    [
        f"{prefix}vit_base_{name}"
        for prefix in ("", "clip_")
        for name in ("singlescan_h2_token2744", "multiscan_h2_token1176")
    ]
)


HUB = {
    "hlip-2025_10_08": "zch0414/hlip-2025_10_08",
    "clip_vit_base_scan_study_dualdinotxt1568": "zch0414/clip-vit_base-scan_study-dualdinotxt1568",
    "clip_vit_base_slice_scan_study_dualdinotxt1568": "zch0414/clip-vit_base-slice_scan_study-dualdinotxt1568",
    "clip_vit_large_scan_study_dualdinotxt1568": "zch0414/clip-vit_large-scan_study-dualdinotxt1568",
    "clip_vit_large_slice_scan_study_dualdinotxt1568": "zch0414/clip-vit_large-slice_scan_study-dualdinotxt1568",
}


def spelled(name: str) -> str:
    """A name of a model as `MODELS` or `ALIASES` spell it, where it is one: hyphens and underscores are alike, as are
    capitals; the hub's user may stand before it, and what released files have around it (chestct_NAME.pt)."""

    def plain(name: str) -> str:
        return re.sub(r"^(zch0414/|chestct_|brainmri_|headct_)|\.pt$", "", name.lower().replace("-", "_"))

    return next((model for model in (*MODELS, *ALIASES) if plain(model) == plain(name)), name)


def hub_name(name: str) -> str:
    """What the hub calls a released model that is given by any of its names there; another name as it is."""
    model = ALIASES.get(spelled(name), spelled(name))
    return HUB[model] if name.lower().startswith("zch0414/") and model in HUB else name


def preset(name: str) -> ModelConfig:
    """The configuration called `name`, in any spelling of `spelled`.

    Raises:
        ValueError: there is none; names the closest, or all.
    """
    name = spelled(name)
    model = ALIASES.get(name, name)
    if model not in MODELS:
        raise ValueError(f"unknown model {name!r}{hint(name, [*MODELS, *ALIASES], MODELS)}")
    config = MODELS[model][0]
    return replace(config, per_prefix=False) if name in ONE_EMBEDDING else config


def list_models() -> dict[str, str]:
    """Names for `create_model`, each with a line of advice: which data, which text tower."""
    return {name: advice for name, (_, advice) in MODELS.items()}
