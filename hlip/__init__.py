"""Language-image pre-training on uncurated 3D medical imaging studies."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate.evaluation import zeroshot_classifier
    from .evaluate.tasks import Task, load_task
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
    "Task": "evaluate.tasks",
    "create_model": "model.clip",
    "list_models": "model.config",
    "load_recipe": "prepare.recipe",
    "load_study": "prepare.studies",
    "load_task": "evaluate.tasks",
    "pack": "study",
    "zeroshot_classifier": "evaluate.evaluation",
}
__all__ = [
    "HLIPModel",
    "ModelConfig",
    "PackedBatch",
    "Recipe",
    "ScanError",
    "Study",
    "Task",
    "create_model",
    "list_models",
    "load_recipe",
    "load_study",
    "load_task",
    "pack",
    "zeroshot_classifier",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
