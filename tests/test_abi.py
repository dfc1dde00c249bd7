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
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hlip_kernels import native as library
from hlip_kernels.backends import BACKENDS, NORM_BACKENDS, native, native_linear, native_norm_gelu
from hlip_kernels.backends.base import AttentionBackend, NormBackend, Regroup
from hlip_kernels.native import interface
from spans import plain_spans

ROOT = Path(__file__).parents[1]
SOURCES = Path("hlip_kernels/native/src")
needs_library = pytest.mark.skipif(library.native().library is None, reason=library.native().reason)
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


# Calls past `hier_attention` and `add_regroup_norm`, which check their arguments


def arguments(**changes: Any) -> dict[str, Any]:
    """Of forward and backward, for two groups of 11 rows each."""
    right: dict[str, Any] = {name: torch.ones(22, 2, 16) for name in ("q", "k", "v", "out", "grad_out")}
    right |= {name: torch.ones(22, 2, 16) for name in ("grad_q", "grad_k", "grad_v")}
    right |= {"queries": plain_spans((11, 11)), "keys": plain_spans((11, 11)), "softmax_scale": 0.25}
    return right | {"lse": torch.ones(2, 22)} | changes


def shaped(*shape: int, **options: Any) -> dict[str, Tensor]:
    """All tensors of this shape, and lse of that which goes with it."""
    rows, heads = shape[:2]
    names = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
    return {name: torch.ones(shape, **options) for name in names} | {"lse": torch.ones(heads, rows)}


def spans(
    side: str, *bounds: int, used: Sequence[int] | None = None, dtype: torch.dtype = torch.int32
) -> dict[str, Any]:
    seqused = None if used is None else torch.tensor(used, dtype=dtype)
    return {side: plain_spans((11, 11))._replace(cu_seqlens=torch.tensor(bounds, dtype=dtype), seqused=seqused)}


HEAD_DIMS = {f"head dim {n}": shaped(22, 2, n) for n in (0, 1, 8, 24, 40, 136, 144, 256)}
DTYPES = {str(dtype): shaped(22, 2, 16, dtype=dtype) for dtype in (torch.float16, torch.float64, torch.int32)}
WRONG: dict[str, dict[str, Any]] = {
    "all on meta": shaped(22, 2, 16, device="meta"),
    "no heads": shaped(22, 0, 16),
    "two dimensions": {"q": torch.ones(22, 32)},
    "keys on meta": {"k": torch.ones(22, 2, 16, device="meta")},
    "keys of two dimensions": {"k": torch.ones(22, 32), "v": torch.ones(22, 32)},
    "keys of more heads": {"k": torch.ones(22, 3, 16), "v": torch.ones(22, 3, 16)},
    "keys in bfloat16": {"k": torch.ones(22, 2, 16, dtype=torch.bfloat16)},
    "values of fewer rows": {"v": torch.ones(21, 2, 16)},
    "values of a wider head": {"v": torch.ones(22, 2, 32)},
    "fewer groups of queries": spans("queries", 0, 22),
    "fewer groups of keys": spans("keys", 0, 22),
    "no scale": {"softmax_scale": math.nan},
    "infinite scale": {"softmax_scale": -math.inf},
    **{
        f"{wrong} of {side}": spans(side, *values, **options)  # type: ignore[arg-type]
        for side in ("queries", "keys")
        for wrong, values, options in (
            ("int64 bounds", (0, 11, 22), {"dtype": torch.int64}),
            ("no bounds", (), {}),
            ("a used number less", (0, 11, 22), {"used": (11,)}),
        )
    },
}
# What numbers tell, which no backend reads back from a GPU.
WRONG_ROWS: dict[str, dict[str, Any]] = {
    "rows less": shaped(21, 2, 16),
    "rows more": shaped(23, 2, 16),
    **{
        f"{wrong} of {side}": spans(side, *values, used=used)
        for side in ("queries", "keys")
        for wrong, values, used in (
            ("bounds beyond the rows", (0, 11, 2200), None),
            ("bounds before the rows' end", (0, 11, 21), None),
            ("bounds that fall", (0, 33, 22), None),
            ("bounds below zero", (0, -11, 22), None),
            ("bounds that begin below zero", (-5, 11, 22), None),
            ("bounds that begin late", (5, 11, 22), None),
            ("more used than there are", (0, 11, 22), (12, 1)),
            ("used below zero", (0, 11, 22), (1, -1)),
            ("used beyond the rows", (0, 11, 2200), (1, 12)),
            ("used from below zero", (-5, 11, 22), (4, 4)),
            ("used where bounds fall", (0, 33, 22), (1, 0)),
            ("used before a bound beyond the rows", (0, 23, 2200), (1, 0)),
            ("used at the least bound", (-(2**31), 11, 22), (2**31 - 1, 0)),
            ("used from the greatest bound", (0, 2**31 - 1, -(2**31)), (1, 1)),
        )
    },
}
WRONG_BACKWARD: dict[str, dict[str, Any]] = {
    "out of fewer rows": {"out": torch.ones(21, 2, 16)},
    "out of fewer heads": {"out": torch.ones(22, 1, 16)},
    "out of a narrower head": {"out": torch.ones(22, 2, 8)},
    "out in bfloat16": {"out": torch.ones(22, 2, 16, dtype=torch.bfloat16)},
    "grad_out of fewer rows": {"grad_out": torch.ones(2, 2, 16)},
    "grad_out in float64": {"grad_out": torch.ones(22, 2, 16, dtype=torch.float64)},
    "grad_out on meta": {"grad_out": torch.ones(22, 2, 16, device="meta")},
    "lse the other way": {"lse": torch.ones(22, 2)},
    "lse of fewer rows": {"lse": torch.ones(2, 10)},
    "lse in bfloat16": {"lse": torch.ones(2, 22, dtype=torch.bfloat16)},
    "grad_q of fewer rows": {"grad_q": torch.ones(21, 2, 16)},
    "grad_k of fewer heads": {"grad_k": torch.ones(22, 1, 16)},
    "grad_v in bfloat16": {"grad_v": torch.ones(22, 2, 16, dtype=torch.bfloat16)},
    "grad_v on meta": {"grad_v": torch.ones(22, 2, 16, device="meta")},
}


@pytest.fixture(params=["forward", "backward"])
def direction(request: pytest.FixtureRequest) -> str:
    return request.param


def call(backend: AttentionBackend, direction: str, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results."""
    q, k, v, queries, keys, scale = (given[name] for name in ("q", "k", "v", "queries", "keys", "softmax_scale"))
    if direction == "forward":
        return backend.forward(q, k, v, queries, keys, scale)
    grads = given["grad_q"], given["grad_k"], given["grad_v"]
    backend.backward(grads, given["grad_out"], q, k, v, given["out"], given["lse"], queries, keys, scale, True)
    return grads


@needs_library
@pytest.mark.parametrize("wrong", [*HEAD_DIMS, *DTYPES, "all on meta", *WRONG_ROWS])
def test_a_direct_call_that_would_leave_its_memory_is_refused(wrong: str, direction: str) -> None:
    call(BACKENDS["native"], direction, arguments())
    with pytest.raises(ValueError):
        call(BACKENDS["native"], direction, arguments(**(HEAD_DIMS | DTYPES | WRONG | WRONG_ROWS)[wrong]))


@pytest.fixture(params=["native", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    if request.param == "native" and library.native().library is None:
        pytest.skip(library.native().reason)
    if request.param == "triton":
        pytest.importorskip("triton")
    return BACKENDS[request.param]


@pytest.mark.parametrize("wrong", [key for key in WRONG if key != "all on meta"])
def test_every_backend_refuses_the_same(wrong: str, backend: AttentionBackend, direction: str) -> None:
    with pytest.raises(ValueError):
        call(backend, direction, arguments(**WRONG[wrong]))


@pytest.mark.parametrize("wrong", WRONG_ROWS)
def test_the_other_backend_on_cpus_refuses_the_same_rows(wrong: str, direction: str) -> None:
    call(BACKENDS["cpu"], direction, arguments())
    with pytest.raises(ValueError):
        call(BACKENDS["cpu"], direction, arguments(**WRONG_ROWS[wrong]))


@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_what_backward_is_given_belongs_together(wrong: str, backend: AttentionBackend) -> None:
    with pytest.raises(ValueError, match=wrong.split()[0]):
        call(backend, "backward", arguments(**WRONG_BACKWARD[wrong]))


@needs_library
def test_memory_of_any_strides(direction: str) -> None:
    torch.manual_seed(0)
    own, turned = BACKENDS["native"], {name: torch.randn(16, 2, 22).permute(2, 1, 0) for name in ("q", "k", "v")}
    plain = {name: x.contiguous() for name, x in turned.items()}
    out, lse = call(own, "forward", arguments(**plain))
    turned |= {"out": out.permute(2, 1, 0).contiguous().permute(2, 1, 0), "lse": lse.T.contiguous().T}
    turned |= {name: torch.ones(16, 2, 22).permute(2, 1, 0) for name in ("grad_q", "grad_k", "grad_v")}
    expected = call(own, direction, arguments(**plain, out=out, lse=lse))
    for x, y in zip(call(own, direction, arguments(**turned)), expected, strict=True):
        assert torch.equal(x, y)


def structure(
    memory: Tensor, bounds: dict[str, Sequence[int]], **changes: int
) -> tuple[interface.Attention, list[Tensor]]:
    """Of two groups of 11 rows each, in these rows of memory; and what its bounds lie in."""
    held = {name: torch.tensor(values, dtype=torch.int32) for name, values in bounds.items()}
    addresses = {name: x.data_ptr() for name, x in held.items()}
    names = ("q", "k", "v", "out", "lse", "grad_out", "grad_q", "grad_k", "grad_v")
    addresses |= {name: row.data_ptr() for name, row in zip(names, memory, strict=True)}
    fields: dict[str, Any] = {"q_rows": 22, "k_rows": 22, "groups": 2, "heads": 2, "head_dim": 16, "threads": 1}
    fields |= dict.fromkeys(("q_stride", "k_stride", "grad_q_stride", "grad_k_stride"), 32)
    return interface.Attention(**addresses, **(fields | {"softmax_scale": 0.25} | changes)), list(held.values())


BOUNDS: dict[str, Sequence[int]] = {"q_bounds": (0, 11, 22), "k_bounds": (0, 11, 22)}


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [{"head_dim": n} for n in (-16, 0, 8, 24, 136, 256)]
    + [{"bfloat16": 2}, {"bfloat16": -1}, {"isa": -1}, {"isa": 4}, {"threads": 0}, {"heads": -1}, {"groups": -1}]
    + [{name: n} for name in ("q_rows", "k_rows") for n in (21, 23, 0, -1)]
    + [{name: n} for name in ("q_stride", "k_stride") for n in (31, 0, -32)]
    + [{name: values} for name in ("q_bounds", "k_bounds") for values in ((0, 33, 22), (-1, 11, 22), (1, 11, 22))]
    + [{name: values} for name in ("q_used", "k_used") for values in ((12, 0), (-1, 11), (0, 12))],
    ids=str,
)
def test_the_library_refuses_by_itself(wrong: dict[str, Any], direction: str) -> None:
    memory = torch.full((9, 4096), 7.0)
    assert not called(memory, direction)
    memory[:] = 7
    assert called(memory, direction, **wrong)
    assert (memory == 7).all()


@needs_library
@pytest.mark.parametrize("name", ["grad_q_stride", "grad_k_stride"])
def test_gradients_whose_rows_overlap_are_refused(name: str) -> None:
    memory = torch.full((9, 4096), 7.0)
    assert called(memory, "backward", **{name: 31})
    assert (memory == 7).all()
    assert not called(memory, "forward", **{name: 31})  # which has none


def called(memory: Tensor, direction: str, isa: int = 0, **changes: Any) -> bool:
    """Whether the library refuses; both of its functions do, or neither."""
    functions = library.native().library
    assert functions is not None
    bounds = {name: values for name, values in changes.items() if isinstance(values, tuple)}
    numbers = {name: value for name, value in changes.items() if name not in bounds}
    attention, held = structure(memory, BOUNDS | bounds, **numbers)
    settings = ctypes.byref(attention), isa, int(direction == "backward")
    size = functions.hlip_attention_scratch(*settings)
    scratch = torch.empty(max(size, 0) + 64, dtype=torch.uint8)
    attention.scratch = -(-scratch.data_ptr() // 64) * 64
    refused = functions.hlip_attention(*settings)
    del held  # not before
    assert (size, refused) == (-1, -1) or (size >= 0 and refused == 0)
    return bool(refused)


@needs_library
def test_scratch_suffices_for_several_long_groups(direction: str) -> None:
    """A shorter one may have more of its heads at a time, and then its tiles take up more."""
    functions = library.native().library
    assert functions is not None

    def scratch(*lengths: int) -> int:
        bounds = tuple(accumulate(lengths, initial=0))
        rows, groups = bounds[-1], len(lengths)
        of_one = structure(
            torch.empty(9, 0),
            {"q_bounds": bounds, "k_bounds": bounds},
            q_rows=rows,
            k_rows=rows,
            groups=groups,
            heads=12,
            head_dim=64,
            **dict.fromkeys(("q_stride", "k_stride", "grad_q_stride", "grad_k_stride"), 768),
        )
        return functions.hlip_attention_scratch(ctypes.byref(of_one[0]), 0, int(direction == "backward"))

    sizes = range(20_000, 260_000, 20_000)
    assert scratch(*sizes) >= max(map(scratch, sizes))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def between_levels(**changes: Any) -> Regroup:
    """From two groups of 11 rows to one, a prefix row each."""
    right: dict[str, Any] = {
        "src": ints(0, 11, 22),
        "dst": ints(0, 21),
        "tiles": ints(0, 0, 1, 0).view(2, 2),
        "children": ints(0, 2),
        "parents": ints(0, 0),
        "num_prefix": 1,
        "coarser": True,
    }
    return Regroup(**(right | changes))


def one_level(**changes: Any) -> Regroup:
    return between_levels(dst=ints(0, 11, 22), children=None, parents=None, coarser=False)._replace(**changes)


UNREAD = {  # what a kernel for GPUs does not see
    "children beyond the groups": between_levels(children=ints(0, 3)),
    "children that begin late": between_levels(children=ints(1, 2)),
    "a coarse group without children": between_levels(children=ints(0, 0, 2), dst=ints(0, 1, 22)),
    "children that fall": between_levels(children=ints(0, 3, 2), dst=ints(0, 11, 22)),
    "children of a group with other patches": between_levels(children=ints(0, 1, 2), dst=ints(0, 10, 22)),
    "bounds beyond the rows": between_levels(src=ints(0, 11, 200)),
    "bounds before the rows' end": between_levels(src=ints(0, 11, 21)),
    "bounds that fall": between_levels(src=ints(0, 30, 22)),
    "bounds that begin below zero": between_levels(src=ints(-1, 11, 22)),
    "dst beyond the rows": between_levels(dst=ints(0, 200)),
    "dst before the rows' end": between_levels(dst=ints(0, 20)),
    "a group smaller than its prefix": between_levels(src=ints(0, 0, 22)),
    "a group of dst smaller than its prefix": between_levels(children=ints(0, 1, 2), dst=ints(0, 0, 22)),
    "two levels without children": one_level(dst=ints(0, 12, 22)),
    "prefix rows of another number": between_levels(num_prefix=3),
}
REGROUPS = {
    "int64 children": between_levels(children=torch.tensor([0, 2])),
    "more children than groups": between_levels(children=ints(0, 1, 2)),
    "no children": between_levels(children=None, parents=None),
    "children without parents": between_levels(parents=None),
    "parents without children": one_level(parents=ints(0, 1)),
    "parents of fewer groups": between_levels(parents=ints(0)),
    "int64 bounds": between_levels(src=torch.tensor([0, 11, 22])),
    "int64 bounds of dst": between_levels(dst=torch.tensor([0, 21])),
    "bounds on meta": between_levels(src=ints(0, 11, 22).to("meta")),
    "more prefix rows than rows": between_levels(num_prefix=30),
    "prefix rows that only dst has room for": between_levels(num_prefix=12),
    "prefix rows below zero": between_levels(num_prefix=-1),
}
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


def norm(backend: NormBackend, changes: dict[str, Any]) -> None:
    """Forward and backward of those that take what is changed. Raises ValueError only if all do."""
    right = {
        **{name: torch.ones(22, 8) for name in ("residual", "update")},
        **{name: torch.ones(21, 8) for name in ("x", "grad_x", "grad_y")},
        **{name: torch.ones(21) for name in ("mean", "rstd")},
        **{name: torch.ones(8) for name in ("weight", "bias", "layer_scale")},
        "path_scale": torch.ones(2),
        "regroup": between_levels(),
        "eps": 1e-6,
    }
    (changed,) = changes or {"regroup": None}
    for function, names in ((backend.forward, FORWARD), (backend.backward, BACKWARD)):
        if changed not in names or (changed == "update" and (changes["update"] is None and names is FORWARD)):
            continue
        given = [(right | changes)[name] for name in names]
        if not changes:
            function(*given)
            continue
        with pytest.raises(ValueError):
            function(*given)


@needs_library
@pytest.mark.parametrize("right", [between_levels(), one_level()])
def test_rows_of_a_norm_belong_together(right: Regroup) -> None:
    backend, rows = NORM_BACKENDS["native"], torch.ones(22, 8)
    x, y, _, _ = backend.forward(rows, rows, None, None, torch.ones(8), torch.ones(8), right, 1e-6)
    assert (x == 2).all()
    assert (y == 1).all()
    norm(backend, {})


@needs_library
@pytest.mark.parametrize("wrong", [*UNREAD, *REGROUPS, *ROWS])
def test_a_norm_called_directly_is_refused(wrong: str) -> None:
    regroups = UNREAD | REGROUPS
    norm(NORM_BACKENDS["native"], {"regroup": regroups[wrong]} if wrong in regroups else ROWS[wrong])


@pytest.mark.parametrize("wrong", [*REGROUPS, *(name for name in ROWS if not name.startswith("residual in"))])
def test_triton_refuses_the_same(wrong: str) -> None:
    pytest.importorskip("triton")
    norm(NORM_BACKENDS["triton"], {"regroup": REGROUPS[wrong]} if wrong in REGROUPS else ROWS[wrong])


@needs_library
@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize(
    "wrong",
    [
        *({"tokens": n} for n in (-1, 19)),
        *({"src_groups": n} for n in (-1, 1)),
        *({"num_prefix": n} for n in (-1, 2)),
        *({"src": bounds} for bounds in (None, (0, 30, 22))),
        *({"dst": bounds} for bounds in (None, (0, 22))),
        *({"children": bounds} for bounds in (None, (0, 3))),
        {"dst_groups": 2},
        {"threads": 0},
        {"src": None, "dst": None},
    ],
    ids=str,
)
def test_the_library_refuses_a_norm_by_itself(wrong: dict[str, Any], backward: int) -> None:
    functions = library.native().library
    assert functions is not None
    memory = torch.full((14, 4096), 7.0)
    names = "residual", "update", "weight", "bias", "x", "y", "mean", "rstd", "grad_y", "grad_residual", "partial"
    fields: dict[str, Any] = {name: row.data_ptr() for name, row in zip((*names, "sums"), memory, strict=False)}
    fields |= {"tokens": 20, "src_groups": 2, "dst_groups": 1, "num_prefix": 1, "width": 8, "threads": 1, "eps": 1e-6}
    maps = {"src": (0, 11, 22), "dst": (0, 21), "children": (0, 2)} | wrong
    held = {name: ints(*maps[name]) for name in ("src", "dst", "children") if maps[name] is not None}
    fields |= {name: value for name, value in wrong.items() if name not in ("src", "dst", "children")}
    call = interface.Norm(**fields, **{name: x.data_ptr() for name, x in held.items()})
    assert functions.hlip_norm(ctypes.byref(call), 0, backward) == -1
    assert (memory == 7).all()


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
        native_norm_gelu.gelu_backward_(grad, x)


def half(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, **options)


def tiles(inner: int, columns: int) -> Tensor:
    return torch.zeros(native_linear.tiles_shape(inner, columns), dtype=torch.uint8)


PRODUCTS: dict[str, Callable[[], Any]] = {
    "a weight in float32": lambda: native_linear.pack(torch.ones(8, 8), False),
    "a weight of one dimension": lambda: native_linear.pack(half(8), False),
    "rows in float32": lambda: native_linear.layers(torch.ones(4, 40), [tiles(40, 8)], [], [8], False),
    "rows of three dimensions": lambda: native_linear.layers(half(4, 40, 1), [tiles(40, 8)], [], [8], False),
    "wider rows": lambda: native_linear.layers(half(4, 70), [tiles(40, 8)], [], [8], False),
    "more columns": lambda: native_linear.layers(half(4, 40), [tiles(40, 8)], [], [80], False),
    "tiles of float32": lambda: native_linear.layers(half(4, 40), [tiles(40, 8).float()], [], [8], False),
    "a short bias": lambda: native_linear.layers(half(4, 40), [tiles(40, 8)], [torch.ones(7)], [8], False),
    "no layer": lambda: native_linear.layers(half(4, 40), [], [], [], False),
    "three layers": lambda: native_linear.layers(half(4, 32), [tiles(32, 32)] * 3, [], [32] * 3, False),
    "a layer without columns": lambda: native_linear.layers(half(4, 32), [tiles(32, 32)] * 2, [], [32], False),
    "layers that do not fit": lambda: native_linear.mlp(half(4, 40), [tiles(40, 8), tiles(64, 40)], [], [8, 40]),
    "one bias of two": lambda: native_linear.mlp(half(4, 8), [tiles(8, 8)] * 2, [torch.ones(8)], [8, 8]),
    "hidden rows less": lambda: native_linear.hidden_gradient(half(4, 40), tiles(40, 8), half(3, 8)),
    "hidden in float32": lambda: native_linear.hidden_gradient(half(4, 40), tiles(40, 8), torch.ones(4, 8)),
    "gradient of other rows": lambda: native_linear.weight_gradient(
        half(5, 8), half(4, 40), torch.ones(8, 40), torch.ones(8), False
    ),
    "a smaller weight": lambda: native_linear.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(8, 30), torch.ones(8), False
    ),
    "a weight by columns": lambda: native_linear.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(40, 8).T, torch.ones(8), False
    ),
    "a bias in bfloat16": lambda: native_linear.weight_gradient(
        half(4, 8), half(4, 40), torch.ones(8, 40), half(8), False
    ),
    "rows in float64": lambda: native_linear.weight_gradient(
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
    monkeypatch.setattr(native_linear, "native", lambda: other)
    yield


@needs_library
@pytest.mark.usefixtures("without_amx")
def test_products_are_refused_where_there_is_no_amx() -> None:
    with pytest.raises(ValueError, match="AMX"):
        native_linear.pack(half(8, 8), False)
    with pytest.raises(ValueError, match="AMX"):
        native_linear.layers(half(4, 40), [tiles(40, 8)], [torch.ones(8)], [8], False)
    with pytest.raises(ValueError, match="AMX"):
        native_linear.weight_gradient(half(4, 8), half(4, 40), torch.ones(8, 40), torch.ones(8), False)
