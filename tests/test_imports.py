"""The rules of the house, read from the imports. Every rule is shown able to fail on a small bad tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES, PROGRAMS = ("hlip_kernels", "hlip"), ("bench", "train")
FLOORS = (  # of hlip: a room uses those of lower floors; those at the bottom, their neighbours, too
    ("terminal", "processes", "output", "arguments"), ("read",), ("study",), ("store",), ("prepare",), ("objective",),
    ("model",), ("embed",), ("evaluate", "explain"), ("train",), ("demo",), ("cli",),
)  # fmt: skip
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILE, MAX_FUNCTION = 400, 60  # lines
LONG_FUNCTIONS: dict[str, str] = {}  # and why
FACE = len(FLOORS)  # hlip/__init__.py: above every room, used by none
TRITON_MODULES = {f"hlip_kernels.backends.triton_{name}" for name in ("attention", "norm", "rows")}
KERNELS_MAY_IMPORT = {"torch", "numpy", "hlip_kernels", *sys.stdlib_module_names}


class Import(NamedTuple):
    source: str  # the importing module, "hlip.model.encoder"
    line: int
    target: str  # the module that is imported, "hlip_kernels"; never a name in it
    names: tuple[str, ...]  # what is taken from it
    at_load: bool  # runs when the source is imported: not in a function, not for type checkers only

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target} {' '.join(self.names)}".rstrip()


def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the packages and programs by its dotted name."""
    found = {}
    for path in sorted(path for top in (*PACKAGES, *PROGRAMS) for path in (root / top).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports(root: Path) -> list[Import]:
    tree = modules(root)
    packages = {".".join(path.parent.relative_to(root).parts) for path in root.glob("**/__init__.py")}
    return [found for name, module in tree.items() for found in _imports(name, module, set(tree), packages)]


def _imports(source: str, module: ast.Module, known: set[str], packages: set[str]) -> Iterator[Import]:
    top = source.partition(".")[0]

    def locate(target: str) -> str:
        """Scripts find their neighbours by bare name: `import sampler` within train/ is train.sampler."""
        if top in PROGRAMS:
            for home in (top, *PROGRAMS):
                if f"{home}.{target.partition('.')[0]}" in known:
                    return f"{home}.{target}"
        return target

    for node, at_load in _walk(module, True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(source, node.lineno, locate(alias.name), (), at_load)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                here = source.split(".") if source in packages else source.split(".")[:-1]
                base = here[: len(here) - node.level + 1]
                target = ".".join([*base, *([node.module] if node.module else [])])
            else:
                target = locate(node.module or "")
            names = [alias.name for alias in node.names]
            for name in names:
                if f"{target}.{name}" in known:
                    yield Import(source, node.lineno, f"{target}.{name}", (), at_load)
            rest = tuple(name for name in names if f"{target}.{name}" not in known)
            if rest:
                yield Import(source, node.lineno, target, rest, at_load)


def _walk(node: ast.AST, at_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below `node`, each with whether it runs when its module is imported."""
    for child in ast.iter_child_nodes(node):
        now = at_load and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield child, now
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for statement in child.body:
                yield statement, False
                yield from _walk(statement, False)
            for statement in child.orelse:
                yield statement, now
                yield from _walk(statement, now)
        else:
            yield from _walk(child, now)


def _top(module: str) -> str:
    return module.partition(".")[0]


def _room(module: str) -> int:
    return ROOMS.get([*module.split("."), ""][1], FACE)


def _beside(source: str, target: str) -> bool:
    """Two rooms on one floor, which do not know of each other; the rooms at the bottom may."""
    return 0 < _room(source) == _room(target) < FACE and source.split(".")[1] != target.split(".")[1]


def kernels_need_torch_only(root: Path) -> list[str]:
    """hlip_kernels never imports hlip; when loaded, nothing but torch, numpy and the standard library.

    Modules of kernels import triton, and nobody imports those when loaded.
    """

    def wrong(found: Import) -> bool:
        if _top(found.target) == "hlip":
            return True
        if found.source in TRITON_MODULES:
            return found.at_load and _top(found.target) not in KERNELS_MAY_IMPORT | {"triton"}
        return found.at_load and (_top(found.target) not in KERNELS_MAY_IMPORT or found.target in TRITON_MODULES)

    return [str(found) for found in imports(root) if _top(found.source) == "hlip_kernels" and wrong(found)]


def rooms_never_call_back_up(root: Path) -> list[str]:
    """Inside hlip, a room uses those below it, and none above or beside it."""
    return [
        str(found)
        for found in imports(root)
        if _top(found.source) == _top(found.target) == "hlip"
        and (_room(found.target) > _room(found.source) or _beside(found.source, found.target))
    ]


def hlip_uses_public_names(root: Path) -> list[str]:
    """Of hlip_kernels, hlip takes the names in `__all__` and no others."""
    face = modules(root).get("hlip_kernels", ast.Module([], []))
    public = next(
        (
            set(ast.literal_eval(node.value))
            for node in face.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        set(),
    )
    return [
        str(found)
        for found in imports(root)
        if _top(found.source) == "hlip"
        and _top(found.target) == "hlip_kernels"
        and found.target != "hlip_kernels.env"  # a program of its own
        and (found.target != "hlip_kernels" or not found.names or not public.issuperset(found.names))
    ]


def programs_stand_alone(root: Path) -> list[str]:
    """bench/ and train/ are imported by nobody but themselves."""
    return [
        str(found)
        for found in imports(root)
        if _top(found.target) in PROGRAMS and _top(found.source) != _top(found.target)
    ]


def no_star_import(root: Path) -> list[str]:
    return [str(found) for found in imports(root) if "*" in found.names]


def no_sys_path(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{node.lineno} uses sys.path"
        for top in (*PACKAGES, *PROGRAMS, "tests", "docs", "examples")
        for path in (root / top).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        or (isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in [a.name for a in node.names])
    ]


def no_cycle(root: Path) -> list[str]:
    """Among the imports that run when a module is loaded."""
    graph: dict[str, set[str]] = {name: set() for name in modules(root)}
    for found in imports(root):
        if found.at_load and found.target in graph:
            graph[found.source].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def files_are_short(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)} has {lines} lines"
        for top in (*PACKAGES, *PROGRAMS)
        for path in (root / top).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE
    ]


def functions_are_short(root: Path) -> list[str]:
    return [
        f"{name}.{node.name} has {lines} lines"
        for name, module in modules(root).items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef) and f"{name}.{node.name}" not in LONG_FUNCTIONS
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION
    ]


Rule = Callable[[Path], list[str]]
RULES: list[Rule] = [
    kernels_need_torch_only,
    rooms_never_call_back_up,
    hlip_uses_public_names,
    programs_stand_alone,
    no_star_import,
    no_sys_path,
    no_cycle,
    files_are_short,
    functions_are_short,
]
KERNELS = "from .layout import Grid\n__all__ = ['Grid']\n"
GOOD = {
    "hlip_kernels/__init__.py": KERNELS,
    "hlip_kernels/layout.py": "import numpy.random, os.path\nfrom torch import Tensor\nGrid = int\n",
    "hlip_kernels/late.py": "def f():\n    import triton\n",
    "hlip/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .cli.main import main\n",
    "hlip/output.py": "from .terminal import say\n",
    "hlip/terminal.py": "",
    "hlip/study.py": "from hlip_kernels import Grid\nfrom .read import nifti\n",
    "hlip/read/__init__.py": "",
    "hlip/read/nifti.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .scan import x\n",
    "hlip/read/scan.py": "from .nifti import x\n",
    "hlip/model/__init__.py": "",
    "hlip/model/clip.py": "from ..study import x\ndef save():\n    from .checkpoint import y\n",
    "hlip/model/checkpoint.py": "from .clip import z\n",
    "hlip/embed/__init__.py": "import hlip.model.clip\nfrom hlip.read import scan\n",
    "hlip/evaluate/__init__.py": "from ..embed import x\n",
    "hlip/cli/main.py": "from .. import evaluate\nimport sys\nsys.argv\n",
    "train/pretrain.py": "from hlip.cli.main import main\nimport hlip_kernels.layout\n",
    "bench/benchlib/config.py": "",
    "bench/benchlib/timing.py": "from .config import x\n",
    "bench/encoder.py": "from benchlib import config, timing\nimport tqdm\n",
}
BAD: list[tuple[Rule, str, str]] = [
    (kernels_need_torch_only, "hlip_kernels/a.py", "from hlip.data import batch"),
    (kernels_need_torch_only, "hlip_kernels/a.py", "def f():\n    import hlip"),
    (kernels_need_torch_only, "hlip_kernels/a.py", "import torch, triton"),
    (kernels_need_torch_only, "hlip_kernels/a.py", "import hlip_kernels.backends.triton_attention"),
    (kernels_need_torch_only, "hlip_kernels/backends/triton_attention.py", "import einops"),
    (kernels_need_torch_only, "hlip_kernels/a.py", "try:\n    from flash_attn import f\nexcept ImportError:\n    pass"),
    (kernels_need_torch_only, "hlip_kernels/a.py", "class A:\n    import einops"),
    (rooms_never_call_back_up, "hlip/read/a.py", "from ..model import clip"),
    (rooms_never_call_back_up, "hlip/read/a.py", "from hlip.embed import x"),
    (rooms_never_call_back_up, "hlip/read/a.py", "def f():\n    import hlip.cli.main"),
    (rooms_never_call_back_up, "hlip/model/a.py", "from .. import embed"),
    (rooms_never_call_back_up, "hlip/model/a.py", "from ..cli.main import main"),
    (rooms_never_call_back_up, "hlip/embed/a.py", "from ..cli.main import main"),
    (rooms_never_call_back_up, "hlip/explain/a.py", "from ..evaluate import x"),
    (rooms_never_call_back_up, "hlip/read/a.py", "from hlip import create_model"),
    (hlip_uses_public_names, "hlip/read/a.py", "from hlip_kernels.layout import Grid"),
    (hlip_uses_public_names, "hlip/read/a.py", "from hlip_kernels import Grid, layout"),
    (hlip_uses_public_names, "hlip/read/a.py", "from hlip_kernels import Grid, hidden"),
    (hlip_uses_public_names, "hlip/read/a.py", "import hlip_kernels"),
    (programs_stand_alone, "bench/a.py", "from train.pretrain import main"),
    (programs_stand_alone, "bench/a.py", "import pretrain"),
    (programs_stand_alone, "train/a.py", "def f():\n    from encoder import x"),
    (programs_stand_alone, "hlip/a.py", "import bench.encoder"),
    (no_star_import, "hlip/read/a.py", "from .nifti import *"),
    (no_star_import, "bench/a.py", "from math import *"),
    (no_sys_path, "hlip/read/a.py", "import sys\nsys.path.insert(0, '.')"),
    (no_sys_path, "train/a.py", "def f():\n    import sys\n    sys.path = []"),
    (no_sys_path, "hlip_kernels/a.py", "from sys import path"),
    (no_sys_path, "tests/a.py", "import sys\nsys.path.append('x')"),
    (no_cycle, "hlip/read/nifti.py", "from .scan import x"),
    (no_cycle, "hlip/read/nifti.py", "if True:\n    from hlip.read import scan"),
    (no_cycle, "hlip_kernels/layout.py", "from . import Grid"),
    (no_cycle, "bench/benchlib/config.py", "from . import timing"),
    (files_are_short, "hlip/read/a.py", "x = 1\n" * 401),
    (functions_are_short, "hlip/read/a.py", "def f():\n" + "    x = 1\n" * 60),
]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_tree_keeps_the_rule(rule: Rule, tmp_path: Path) -> None:
    assert rule(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize(("rule", "file", "source"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_a_bad_tree_breaks_the_rule(rule: Rule, file: str, source: str, tmp_path: Path) -> None:
    assert rule(plant(tmp_path, {**GOOD, file: source})) != []


def test_the_house_was_read() -> None:
    """Imports are found and resolved: without this, the rules would hold for a tree nobody read."""
    found = {(each.source, each.target, each.at_load) for each in imports(ROOT)}
    assert ("hlip_kernels.attention", "hlip_kernels.ops", True) in found  # from . import ops
    assert ("hlip.model.encoder", "hlip.study", True) in found  # from ..study import ...
    assert ("hlip.model.encoder", "hlip_kernels", True) in found
    assert ("hlip.cli.train", "hlip.train.pretrain", False) in found  # within a function
    assert ("hlip", "hlip.model.clip", False) in found  # for type checkers only
    assert ("bench.encoder", "bench.benchlib.encoders", True) in found  # a neighbour by bare name
