"""Language-image pre-training on uncurated 3D medical imaging studies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.batch import PackedBatch, Study, pack
    from .data.preprocess import Recipe, load_recipe
    from .data.readers import ScanError
    from .data.studies import load_study
    from .model.clip import HLIPModel, create_model
    from .model.config import ModelConfig, list_models
    from .tasks.zeroshot import zeroshot_classifier

_HOMES = {
    "HLIPModel": "model.clip",
    "ModelConfig": "model.config",
    "PackedBatch": "data.batch",
    "Recipe": "data.preprocess",
    "ScanError": "data.readers",
    "Study": "data.batch",
    "create_model": "model.clip",
    "list_models": "model.config",
    "load_recipe": "data.preprocess",
    "load_study": "data.studies",
    "pack": "data.batch",
    "zeroshot_classifier": "tasks.zeroshot",
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
