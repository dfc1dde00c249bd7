"""The border between Python and the native library: a library of other sources is refused, and so is every call that
would leave the memory of its tensors."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abi_cases import needs_library
from hlip_kernels import native as library
from hlip_kernels.backends import native
from hlip_kernels.native import interface

ROOT = Path(__file__).parents[1]
SOURCES = Path("hlip_kernels/native/src")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++")
KINDS = {ctypes.c_void_p: "p", ctypes.c_int32: "i", ctypes.c_int64: "l", ctypes.c_float: "f", None: "v"}


def build(folder: Path, files: str, change: Callable[[str], str] = str, flags: str = "") -> Path:
    """The library by setup.py, of these of its sources, each changed."""
    (folder / SOURCES).mkdir(parents=True)
    (folder / "hlip").mkdir()
    for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml", "hlip_kernels/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
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
#include "linear.h"
#include "norm_gelu.h"
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

    class Gelu(ctypes.Structure):
        _fields_ = interface.Gelu._fields_[:-1]

    class Attention(ctypes.Structure):
        _fields_ = (*interface.Attention._fields_, ("more", ctypes.c_int32))

    class Layer(ctypes.Structure):
        _fields_ = (*interface.Layer._fields_[:2], *interface.Layer._fields_[:1:-1])

    for structure in (Gelu, Layer):
        assert ctypes.sizeof(structure) == ctypes.sizeof(getattr(interface, structure.__name__))
    for structure in (Gelu, Attention, Layer):
        assert compiles(KIND + layout_of(structure)).returncode != 0


@needs_compiler
def test_functions_and_isas_are_those_of_the_headers() -> None:
    headers = "".join((ROOT / SOURCES / name).read_text() for name in ("attention.h", "linear.h", "norm_gelu.h"))
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
@pytest.mark.parametrize("source", ["attention_generic.cpp", "attention_forward_amx.cpp", "attention_backward_amx.cpp"])
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
    "a field in attention": lambda text: text.replace("float softmax_scale;", "float softmax_scale, cap;"),
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
        ([f"-DHLIP_ABI={interface.ABI}", "-Dfloat=double"], '#include "abi.cpp"'),
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
        return text.replace("    int64_t q_rows, k_rows;", "    int64_t q_rows, k_rows, more;")

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
