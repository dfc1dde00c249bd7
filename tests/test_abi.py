"""The border between Python and the native library: a library of other sources is refused, and so is every call that
would leave the memory of its tensors."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import plain_groups
from hlip_kernels import native as library
from hlip_kernels.backends import cpu, native, native_product, native_rows
from hlip_kernels.backends.groups import Groups, Regroup
from hlip_kernels.native import interface

ROOT = Path(__file__).parents[1]
SOURCES = Path("hlip_kernels/native/src")
needs_library = pytest.mark.skipif(library.native().library is None, reason=library.native().reason)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++")
KINDS = {ctypes.c_void_p: "p", ctypes.c_int32: "i", ctypes.c_int64: "l", ctypes.c_float: "f", None: "v"}


def build(folder: Path, files: str, change: Callable[[str], str] = str, flags: str = "") -> Path:
    """The library by setup.py, of these of its sources, each changed."""
    (folder / SOURCES).mkdir(parents=True)
    (folder / "hlip").mkdir()
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for path in {*(ROOT / SOURCES).glob("*.h"), *(ROOT / SOURCES).glob(files)}:
        (folder / SOURCES / path.name).write_text(change(path.read_text()))
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, env={"PATH": os.environ["PATH"], "CXXFLAGS": flags}
    )
    return folder / SOURCES.parent / "libhlip_native.so"


def compiles(program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = ["g++", "-std=c++17", "-fsyntax-only", "-I", str(ROOT / SOURCES), *flags, "-xc++", "-"]
    return subprocess.run(command, input=program, capture_output=True, text=True)


def compiled(folder: Path, program: str, *flags: str) -> Path:
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-I", str(ROOT / SOURCES), *flags, "-xc++", "-", "-o"]
    subprocess.run([*command, str(folder / "library.so")], input=program, text=True, check=True)
    return folder / "library.so"


def kind_of(c_type: Any) -> str:
    """As `kind` of the program below names it."""
    if c_type in KINDS:
        return KINDS[c_type]
    return "p" if issubclass(c_type, ctypes._Pointer) else "s"


KIND = """
#include <stddef.h>
#include <type_traits>
#include "attention.h"
#include "product.h"
#include "rows.h"
template <typename T> constexpr char kind() {
    return std::is_pointer_v<T> ? 'p' : std::is_same_v<T, int32_t> ? 'i' : std::is_same_v<T, int64_t> ? 'l'
        : std::is_same_v<T, float> ? 'f' : std::is_void_v<T> ? 'v' : std::is_class_v<T> ? 's' : '?';
}
template <typename R, typename... A> constexpr bool is(R (*)(A...), const char* kinds) {
    const char own[] = {kind<R>(), kind<A>()..., 0};
    for (size_t i = 0; i < sizeof own; ++i) if (own[i] != kinds[i]) return false;
    return true;
}
"""


def layout_of(structure: type[ctypes.Structure]) -> str:
    """A program that compiles if the structure of the headers has these fields and no others."""
    name, fields = structure.__name__, structure._fields_
    lines = [f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});"]
    for field, c_type, *_ in fields:
        place, member = getattr(structure, field), f"{name}::{field}"
        lines.append(f"static_assert(offsetof({name}, {field}) == {place.offset} && sizeof({member}) == {place.size});")
        lines.append(f"static_assert(kind<decltype({member})>() == '{kind_of(c_type)}');")
    names = ", ".join(f"f{i}" for i in range(len(fields)))
    return "\n".join([*lines, f"void all_of({name}& x) {{ auto& [{names}] = x; }}"])


@needs_compiler
@pytest.mark.parametrize("structure", interface.STRUCTURES)
def test_structures_are_those_of_the_headers(structure: type[ctypes.Structure]) -> None:
    done = compiles(KIND + layout_of(structure))
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_structures_that_differ_do_not_pass() -> None:
    """The test above sees a field more in the headers, even in padding, one less, and two in each other's place."""

    class Attention(ctypes.Structure):
        _fields_ = (*interface.Attention._fields_, ("more", ctypes.c_int32))

    class Gelu(ctypes.Structure):
        _fields_ = interface.Gelu._fields_[:-1]

    class Layer(ctypes.Structure):
        _fields_ = (*interface.Layer._fields_[:2], *interface.Layer._fields_[:1:-1])

    for structure in (Attention, Gelu, Layer):
        assert ctypes.sizeof(structure) == ctypes.sizeof(getattr(interface, structure.__name__))
        assert compiles(KIND + layout_of(structure)).returncode != 0


@needs_compiler
def test_functions_and_isas_are_those_of_the_headers() -> None:
    headers = "".join((ROOT / SOURCES / name).read_text() for name in ("attention.h", "product.h", "rows.h"))
    declared = set(re.findall(r"^\w+ (hlip_\w+)\(", headers, re.MULTILINE))
    assert declared == interface.FUNCTIONS.keys() - {"hlip_abi"}
    lines = [
        f'static_assert(is(&{name}, "{"".join(map(kind_of, (result, *arguments)))}"));'
        for name, (result, arguments) in interface.FUNCTIONS.items()
        if name in declared
    ]
    for i, isa in enumerate(("generic", *interface.ISAS[1:])):
        lines.append(f"static_assert(HLIP_{isa.upper()} == {i});")
    lines.append(f"static_assert(HLIP_ISAS == {len(interface.ISAS)});")
    lines.append(f"static_assert(HEAD_STEP * HEAD_WIDTHS == {native.MAX_HEAD_DIM});")
    done = compiles(KIND + "\n".join(lines))
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("source", ["vector_generic.cpp", "forward_amx.cpp", "backward_amx.cpp"])
def test_a_table_with_a_gap_does_not_compile(source: str, tmp_path: Path) -> None:
    """Of kernels by head dim: it would call what is not there."""
    header = (ROOT / SOURCES / "attention.h").read_text()
    wider = header.replace("HEAD_WIDTHS = 4", "HEAD_WIDTHS = 5")
    assert wider != header
    flags = ["-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx512vbmi", "-mavx512bf16"]
    for path in (ROOT / SOURCES).iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "attention.h").write_text(wider)
    command = ["g++", "-std=c++17", "-fsyntax-only", *flags, "-mamx-tile", "-mamx-bf16", str(tmp_path / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "a kernel for every width" in done.stderr


@needs_compiler
def test_the_number_of_the_headers(tmp_path: Path) -> None:
    """Where this fails, the headers have changed: write the number into interface.py."""
    made = ctypes.CDLL(str(build(tmp_path, "abi.cpp")))
    made.hlip_abi.restype = ctypes.POINTER(ctypes.c_int64)
    assert hex(made.hlip_abi()[0]) == hex(interface.ABI)


CHANGES: dict[str, Callable[[str], str]] = {
    "a field that fits into padding": lambda text: text.replace("float softmax_scale;", "float softmax_scale, cap;"),
    "a field in a norm": lambda text: text.replace("float* path_scale;", "float *path_scale, *token_scale;"),
    "two fields of one size": lambda text: text.replace("heads, head_dim;", "head_dim, heads;"),
    "two fields of another structure": lambda text: text.replace("void *hidden, *active;", "void *active, *hidden;"),
    "a field less": lambda text: text.replace("    int32_t add;\n", ""),
    "two arguments": lambda text: text.replace("int32_t isa, int32_t backward);", "int32_t backward, int32_t isa);"),
    "an instruction set before others": lambda text: text.replace("HLIP_AVX2, ", "HLIP_SSE, HLIP_AVX2, "),
    "another meaning": lambda text: text.replace("natural logarithm", "logarithm to base 2"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("change", CHANGES)
def test_a_library_of_other_headers_is_refused(change: str, tmp_path: Path) -> None:
    changed = []

    def alter(text: str) -> str:
        after = CHANGES[change](text)
        changed.append(after != text)
        return after

    path = build(tmp_path, "abi.cpp", alter)
    assert any(changed)
    with pytest.raises(ValueError, match=re.escape(str(path)) + r".*expected interface"):
        interface.load(path)


@needs_compiler
@pytest.mark.parametrize(
    ("flags", "program"),
    [
        ([], 'extern "C" int hlip_isa() { return 0; }'),  # as before there was a number
        (["-DHLIP_ABI=1"], '#include "abi.cpp"'),
        ([f"-DHLIP_ABI={interface.ABI + 1}"], '#include "abi.cpp"'),
        ([f"-DHLIP_ABI={interface.ABI}"], '#include "attention.h"\n#define HLIP_ISAS 5\n#include "abi.cpp"'),
        ([f"-DHLIP_ABI={interface.ABI}", "-fpack-struct=1"], '#include "abi.cpp"'),
    ],
)
def test_older_and_newer_libraries_are_refused(flags: list[str], program: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="built from other sources"):
        interface.load(compiled(tmp_path, program, *flags))


TRY = """
import sys, torch
from pathlib import Path
from hlip_kernels import StudyLayout, available_backends, env, hier_attention, native
for path in sys.argv[1:]:
    native.PATH = Path(path)
    native.native.cache_clear()
    assert native.native().library is None, path
    assert "pip install" in native.native().reason, path
assert available_backends()[0] == "cpu"
layout = StudyLayout.from_grids([[(2, 4, 4)]])
qkv = torch.randn(34, 3, 2, 16)
out = {name: hier_attention(qkv, layout, "slice", backend=name) for name in ("auto", "reference")}
torch.testing.assert_close(out["auto"], out["reference"])
assert "pip install" in env.report().partition("gpu")[0]
try:
    hier_attention(qkv, layout, "slice", backend="native")
except ValueError as error:
    print(error)
"""


def refused(*paths: Path) -> str:
    """What the last of these libraries is refused with, in a process that goes on without; all must be."""
    command = [sys.executable, "-c", TRY, *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@needs_library
def test_what_is_no_library_is_refused_and_nothing_ends(tmp_path: Path) -> None:
    """Other processors' libraries, and files that are cut anywhere, which the loader would map beyond their end."""
    whole = library.PATH.read_bytes()
    contents = {
        "empty": b"",
        "text": b"not a library\n",
        "magic": b"\x7fELF",
        "aarch64": whole[:18] + b"\xb7\0" + whole[20:],
        "32 bits": whole[:4] + b"\1" + whole[5:],
        **{f"cut after {i} of 16": whole[: len(whole) * i // 16] for i in range(1, 16)},
        "without its last byte": whole[:-1],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    assert "cannot be loaded" in refused(tmp_path / "folder", *(tmp_path / name for name in contents))


@needs_compiler
@pytest.mark.slow
def test_a_whole_library_with_one_field_more(tmp_path: Path) -> None:
    def change(text: str) -> str:
        return text.replace("    int64_t rows;\n    int32_t groups", "    int64_t rows, more;\n    int32_t groups")

    path = build(tmp_path, "*.cpp", change, "-O0")
    message = refused(path)
    assert str(path) in message
    assert "built from other sources" in message


@needs_library
def test_every_function_is_declared() -> None:
    functions = library.native().library
    assert functions is not None
    for name, (result, arguments) in interface.FUNCTIONS.items():
        if hasattr(functions, name):
            assert getattr(functions, name).argtypes == arguments
            assert getattr(functions, name).restype == result


# Calls past `hier_attention` and `add_regroup_norm`, which check their arguments


def arguments(**changes: Any) -> dict[str, Any]:
    """Of forward and backward, for two groups of 10 patches and a prefix row each."""
    qkv = changes.get("qkv", torch.ones(22, 3, 2, 16))
    right = {
        "qkv": qkv,
        "groups": plain_groups((10, 10), 1),
        "softmax_scale": 0.25,
        "out": torch.ones(22, *qkv.shape[2:], dtype=qkv.dtype),
        "lse": torch.ones(qkv.shape[2], 22) if qkv.dim() == 4 else torch.ones(2, 22),
        "grad_out": torch.ones(22, *qkv.shape[2:], dtype=qkv.dtype),
    }
    return right | changes


def bounds(*values: int, dtype: torch.dtype = torch.int32, num_prefix: int = 1) -> dict[str, Groups]:
    groups = plain_groups((10, 10), 1)
    return {"groups": groups._replace(cu_seqlens=torch.tensor(values, dtype=dtype), num_prefix=num_prefix)}


def shaped(*shape: int, **options: Any) -> dict[str, Tensor]:
    return {"qkv": torch.ones(shape, **options)}


HEAD_DIMS = {f"head dim {n}": shaped(22, 3, 2, n) for n in (0, 1, 8, 24, 40, 136, 144, 256)}
DTYPES = {str(dtype): shaped(22, 3, 2, 16, dtype=dtype) for dtype in (torch.float16, torch.float64, torch.int32)}
WRONG: dict[str, dict[str, Any]] = {
    "on meta": shaped(22, 3, 2, 16, device="meta"),
    "two slots": shaped(22, 2, 2, 16),
    "no heads": shaped(22, 3, 0, 16),
    "three dimensions": shaped(22, 3, 32),
    "rows less": shaped(21, 3, 2, 16),
    "rows more": shaped(23, 3, 2, 16),
    "int64 bounds": bounds(0, 10, 20, dtype=torch.int64),
    "bounds beyond the rows": bounds(0, 10, 2000),
    "bounds before the rows' end": bounds(0, 10, 19),
    "bounds that fall": bounds(0, 30, 20),
    "bounds below zero": bounds(0, -10, 20),
    "bounds that begin below zero": bounds(-5, 10, 20),
    "bounds that begin late": bounds(5, 10, 20),
    "no bounds": bounds(),
    "two prefix rows": bounds(0, 10, 20, num_prefix=2),
    "prefix rows below zero": bounds(0, 12, 24, num_prefix=-1),
    "no scale": {"softmax_scale": math.nan},
    "infinite scale": {"softmax_scale": -math.inf},
}
WRONG_BACKWARD: dict[str, dict[str, Any]] = {
    "out of fewer rows": {"out": torch.ones(21, 2, 16)},
    "out of fewer heads": {"out": torch.ones(22, 1, 16)},
    "out of a narrower head": {"out": torch.ones(22, 2, 8)},
    "out in bfloat16": {"out": torch.ones(22, 2, 16, dtype=torch.bfloat16)},
    "gradient of fewer rows": {"grad_out": torch.ones(2, 2, 16)},
    "gradient in float64": {"grad_out": torch.ones(22, 2, 16, dtype=torch.float64)},
    "gradient on meta": {"grad_out": torch.ones(22, 2, 16, device="meta")},
    "lse the other way": {"lse": torch.ones(22, 2)},
    "lse of fewer rows": {"lse": torch.ones(2, 10)},
    "lse in bfloat16": {"lse": torch.ones(2, 22, dtype=torch.bfloat16)},
}


@pytest.fixture(params=["forward", "backward"])
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


def call(backend: ModuleType, direction: str, given: dict[str, Any]) -> Any:
    if direction == "forward":
        return backend.forward(*(given[name] for name in ("qkv", "groups", "softmax_scale")))
    return backend.backward(*(given[name] for name in ("grad_out", "qkv", "out", "lse", "groups", "softmax_scale")))


@needs_library
@pytest.mark.parametrize("wrong", [*HEAD_DIMS, *DTYPES, *WRONG])
def test_a_direct_call_that_would_leave_its_memory_is_refused(wrong: str, direction: str) -> None:
    call(native, direction, arguments())
    with pytest.raises(ValueError):
        call(native, direction, arguments(**(HEAD_DIMS | DTYPES | WRONG)[wrong]))


@pytest.mark.parametrize("wrong", [key for key in WRONG if key != "on meta"])
def test_other_backends_refuse_the_same(wrong: str, direction: str) -> None:
    triton_attention = pytest.importorskip("hlip_kernels.backends.triton_attention")
    call(cpu, direction, arguments())
    for backend in (cpu,) if wrong.endswith(("that fall", "below zero")) else (cpu, triton_attention):
        with pytest.raises(ValueError):
            call(backend, direction, arguments(**WRONG[wrong]))


@needs_library
@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_what_backward_is_given_belongs_together(wrong: str) -> None:
    triton_attention = pytest.importorskip("hlip_kernels.backends.triton_attention")
    for backend in (native, cpu, triton_attention):
        with pytest.raises(ValueError, match=wrong.split()[0].replace("gradient", "grad_out")):
            call(backend, "backward", arguments(**WRONG_BACKWARD[wrong]))


@needs_library
def test_memory_of_any_strides(direction: str) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(16, 2, 3, 22)
    out, lse = native.forward(qkv.permute(3, 2, 1, 0).contiguous(), plain_groups((10, 10), 1), 0.25)
    given = arguments(qkv=qkv.permute(3, 2, 1, 0), out=out, lse=lse)
    plain = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in given.items()}
    given |= {"out": out.permute(2, 1, 0).contiguous().permute(2, 1, 0), "lse": lse.T.contiguous().T}
    for got, expected in zip(call(native, direction, given), call(native, direction, plain), strict=True):
        assert torch.equal(got, expected)


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [{"head_dim": n} for n in (-16, 0, 8, 24, 136, 256)]
    + [{"bfloat16": 2}, {"bfloat16": -1}, {"isa": -1}, {"isa": 4}, {"threads": 0}, {"rows": 21}, {"groups": -1}]
    + [{"num_prefix": -1}, {"heads": -1}, {"cu_seqlens": (0, 30, 20)}, {"cu_seqlens": (-1, 10, 20)}],
    ids=str,
)
def test_the_library_refuses_by_itself(wrong: dict[str, Any], direction: str) -> None:
    functions = library.native().library
    assert functions is not None
    memory = torch.full((4, 4096), 7.0)
    values = torch.tensor(wrong.get("cu_seqlens", (0, 10, 20)), dtype=torch.int32)
    fields = {"rows": 22, "groups": 2, "num_prefix": 1, "heads": 2, "head_dim": 16, "threads": 1, "softmax_scale": 0.25}
    fields |= {name: value for name, value in wrong.items() if name not in ("isa", "cu_seqlens")}
    out, grad_qkv, lse, qkv = (row.data_ptr() for row in memory)
    attention = interface.Attention(
        qkv=qkv, cu_seqlens=values.data_ptr(), out=out, lse=lse, grad_out=qkv, grad_qkv=grad_qkv, **fields
    )
    settings = ctypes.byref(attention), wrong.get("isa", 0), int(direction == "backward")
    assert functions.hlip_attention_scratch(*settings) == -1
    assert functions.hlip_attention(*settings) == -1
    assert (memory == 7).all()


def carried(**changes: Any) -> Regroup:
    """From two groups of 10 patches to one, a prefix row each."""
    right: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 10, 20], dtype=torch.int32),
        "tiles": plain_groups((10, 10), 1).tiles[0],
        "children": torch.tensor([0, 2], dtype=torch.int32),
        "num_prefix": 1,
        "dst_groups": 1,
    }
    return Regroup(**(right | changes))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


REGROUPS = {
    "children beyond the groups": carried(children=ints(0, 3)),
    "children that fall": carried(children=ints(0, 3, 2), dst_groups=2, cu_seqlens=ints(0, 10, 10, 20)),
    "int64 children": carried(children=torch.tensor([0, 2])),
    "more children than groups": carried(children=ints(0, 1, 2)),
    "no children": carried(children=None),
    "bounds beyond the rows": carried(cu_seqlens=ints(0, 10, 200)),
    "bounds that fall": carried(cu_seqlens=ints(0, 30, 20)),
    "int64 bounds": carried(cu_seqlens=torch.tensor([0, 10, 20])),
    "prefix rows of another number": carried(num_prefix=3),
    "more prefix rows than rows": carried(num_prefix=30),
    "prefix rows below zero": carried(num_prefix=-1),
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "residual": {"residual": torch.ones(21, 8)},
    "residual in float16": {"residual": torch.ones(22, 8, dtype=torch.float16)},
    "residual in float64": {"residual": torch.ones(22, 8, dtype=torch.float64)},
    "three dimensions": {"residual": torch.ones(22, 8, 1)},
    "update": {"update": torch.ones(21, 8)},
    "narrower update": {"update": torch.ones(22, 4)},
    "update on meta": {"update": torch.ones(22, 8, device="meta")},
    "path_scale": {"path_scale": torch.ones(1)},
    "layer_scale": {"layer_scale": torch.ones(4)},
    "weight": {"weight": torch.ones(7)},
    "bias": {"bias": torch.ones(9, 1)},
    "mean": {"mean": torch.ones(2)},
    "rstd in float64": {"rstd": torch.ones(21, dtype=torch.float64)},
    "grad_x": {"grad_x": torch.ones(22, 8)},
    "grad_y": {"grad_y": torch.ones(20, 8)},
    "x": {"x": torch.ones(22, 8)},
    "no update": {"update": None},
}
FORWARD = ("residual", "update", "path_scale", "layer_scale", "weight", "bias", "regroup", "eps")
BACKWARD = ("grad_x", "grad_y", "x", "mean", "rstd", "update", "path_scale", "layer_scale", "weight", "regroup")


def norm(module: ModuleType, changes: dict[str, Any]) -> None:
    """Forward and backward of those that take what is changed. Raises ValueError only if all do."""
    right = {
        **{name: torch.ones(22, 8) for name in ("residual", "update")},
        **{name: torch.ones(21, 8) for name in ("x", "grad_x", "grad_y")},
        **{name: torch.ones(21) for name in ("mean", "rstd")},
        **{name: torch.ones(8) for name in ("weight", "bias", "layer_scale")},
        "path_scale": torch.ones(2),
        "regroup": carried(),
        "eps": 1e-6,
    }
    (changed,) = changes or {"regroup": None}
    for function, names in ((module.norm_forward, FORWARD), (module.norm_backward, BACKWARD)):
        if changed not in names or (changed == "update" and (changes["update"] is None and names is FORWARD)):
            continue
        given = [(right | changes)[name] for name in names]
        if not changes:
            function(*given)
            continue
        with pytest.raises(ValueError):
            function(*given)


@needs_library
def test_rows_of_a_norm_belong_together() -> None:
    norm(native_rows, {})


@needs_library
@pytest.mark.parametrize("wrong", [*REGROUPS, *ROWS])
def test_a_norm_called_directly_is_refused(wrong: str) -> None:
    norm(native_rows, {"regroup": REGROUPS[wrong]} if wrong in REGROUPS else ROWS[wrong])


@needs_library
@pytest.mark.parametrize(
    ("grad", "x"),
    [
        (torch.ones(4, 8), torch.ones(4, 9)),
        (torch.ones(32), torch.ones(4, 8)),
        (torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(4, 8)),
        (torch.ones(4, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)),
        (torch.ones(4, 8, dtype=torch.float16), torch.ones(4, 8, dtype=torch.float16)),
        (torch.ones(8, 4).T, torch.ones(4, 8)),
        (torch.ones(4, 8), torch.ones(8, 4).T),
        (torch.ones(4, 1).expand(4, 8), torch.ones(4, 8)),
        (torch.ones(4, 8, device="meta"), torch.ones(4, 8)),
    ],
)
def test_a_gelu_called_directly_is_refused(grad: Tensor, x: Tensor) -> None:
    with pytest.raises(ValueError):
        native_rows.gelu_backward_(grad, x)


def half(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, **options)


def tiles(inner: int, columns: int) -> Tensor:
    return torch.zeros(native_product.tiles_shape(inner, columns), dtype=torch.uint8)


PRODUCTS: dict[str, Callable[[], Any]] = {
    "a weight in float32": lambda: native_product.pack(torch.ones(8, 8), False),
    "a weight of one dimension": lambda: native_product.pack(half(8), False),
    "rows in float32": lambda: native_product.layers(torch.ones(4, 40), [tiles(40, 8)], [], [8], False),
    "rows of three dimensions": lambda: native_product.layers(half(4, 40, 1), [tiles(40, 8)], [], [8], False),
    "wider rows": lambda: native_product.layers(half(4, 70), [tiles(40, 8)], [], [8], False),
    "more columns": lambda: native_product.layers(half(4, 40), [tiles(40, 8)], [], [80], False),
    "tiles of float32": lambda: native_product.layers(half(4, 40), [tiles(40, 8).float()], [], [8], False),
    "a short bias": lambda: native_product.layers(half(4, 40), [tiles(40, 8)], [torch.ones(7)], [8], False),
    "no layer": lambda: native_product.layers(half(4, 40), [], [], [], False),
    "three layers": lambda: native_product.layers(half(4, 32), [tiles(32, 32)] * 3, [], [32] * 3, False),
    "a layer without columns": lambda: native_product.layers(half(4, 32), [tiles(32, 32)] * 2, [], [32], False),
    "layers that do not fit": lambda: native_product.mlp(half(4, 40), [tiles(40, 8), tiles(64, 40)], [], [8, 40]),
    "one bias of two": lambda: native_product.mlp(half(4, 8), [tiles(8, 8)] * 2, [torch.ones(8)], [8, 8]),
    "hidden rows less": lambda: native_product.hidden_gradient(half(4, 40), tiles(40, 8), half(3, 8)),
    "hidden in float32": lambda: native_product.hidden_gradient(half(4, 40), tiles(40, 8), torch.ones(4, 8)),
    "gradient of other rows": lambda: native_product.weight_gradient(
        half(5, 8), half(4, 40), torch.ones(8, 40), torch.ones(8), False
    ),
    "a smaller weight": lambda: native_product.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(8, 30), torch.ones(8), False
    ),
    "a weight by columns": lambda: native_product.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(40, 8).T, torch.ones(8), False
    ),
    "a bias in bfloat16": lambda: native_product.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(8, 40), half(8), False
    ),
    "rows in float64": lambda: native_product.weight_gradient(
        half(4, 8).double(), half(4, 40), torch.ones(8, 40), torch.ones(8), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", PRODUCTS)
def test_a_product_called_directly_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError) as caught:
        PRODUCTS[wrong]()
    assert "AMX" not in str(caught.value)  # the same everywhere


@pytest.fixture
def without_amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    other = library.native()._replace(isa="avx512")
    monkeypatch.setattr(native_product, "native", lambda: other)
    yield


@needs_library
@pytest.mark.usefixtures("without_amx")
def test_products_are_refused_where_there_is_no_amx() -> None:
    with pytest.raises(ValueError, match="AMX"):
        native_product.pack(half(8, 8), False)
    with pytest.raises(ValueError, match="AMX"):
        native_product.layers(half(4, 40), [tiles(40, 8)], [torch.ones(8)], [8], False)
    with pytest.raises(ValueError, match="AMX"):
        native_product.weight_gradient(half(4, 8), half(4, 40), torch.ones(8, 40), torch.ones(8), False)
