"""open_clip, from the environment or from beside it; see the Makefile."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(sys.prefix) / "open-clip"
# What torchvision's compiled part declares. Declared twice in a process is an error, so this lives as long as that.
_declared: list[Any] = []


@contextmanager
def open_clip_imported() -> Iterator[ModuleType | None]:
    """The module; None where there is none. What was imported for it is forgotten afterwards."""
    if importlib.util.find_spec("open_clip"):
        import open_clip

        yield open_clip
        return
    if not FOLDER.is_dir():
        yield None
        return
    before = set(sys.modules)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(FOLDER))
            _declare_operators()
            import open_clip

            yield open_clip
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("open_clip", "timm", "torchvision", "ftfy", "wcwidth"):
                del sys.modules[name]


def _declare_operators() -> None:
    """Declare torchvision's operators (of detection; classification needs none), which its Python code describes.

    Its wheels are built for CUDA's torch: beside another torch the compiled part, which declares them, does not load.
    """
    if _declared:
        return
    library = torch.library.Library("torchvision", "DEF")
    source = (FOLDER / "torchvision" / "_meta_registrations.py").read_text(encoding="utf-8")
    for name in dict.fromkeys(re.findall(r'^@.*"(?:torchvision::)?(\w+)"\)$', source, re.MULTILINE)):
        library.define(f"{name}(Tensor x) -> Tensor")
    _declared.append(library)
