"""Language-image pre-training on uncurated 3D medical imaging studies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate.zeroshot import zeroshot_classifier
    from .model.clip import HLIPModel, create_model
    from .model.config import ModelConfig, list_models
    from .prepare.recipe import Recipe, load_recipe
    from .prepare.studies import load_study
    from .read.scan import ScanError
    from .study import PackedBatch, Study, pack

_HOMES = {
    "HLIPModel": "model.clip",
    "ModelConfig": "model.config",
    "PackedBatch": "study",
    "Recipe": "prepare.recipe",
    "ScanError": "read.scan",
    "Study": "study",
    "create_model": "model.clip",
    "list_models": "model.config",
    "load_recipe": "prepare.recipe",
    "load_study": "prepare.studies",
    "pack": "study",
    "zeroshot_classifier": "evaluate.zeroshot",
}
__all__ = [
    "HLIPModel",
    "ModelConfig",
    "PackedBatch",
    "Recipe",
    "ScanError",
    "Study",
    "create_model",
    "list_models",
    "load_recipe",
    "load_study",
    "pack",
    "zeroshot_classifier",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
