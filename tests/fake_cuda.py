"""Fake tensors on "cuda" where there is no CUDA: the path of a GPU up to its kernels, on any machine.

PyTorch built without CUDA makes such tensors, but refuses to move, copy or slice them, and aborts the process where
autograd takes one up, until a device guard for CUDA is registered. Registering cannot be undone and changes what other
tests would see, so it is done in a process of its own: see the fixture `fake_cuda`.

Two things need a real card still: autograd's engine (call the backward ops by themselves) and CUDA autocast, which
switches itself off (give the dtypes).
"""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def why_not() -> str:
    """Why there can be no fake CUDA here; empty if there can."""
    if torch.version.cuda or torch.version.hip or torch.cuda.is_available():
        return "this PyTorch has a device guard of its own for CUDA"
    return "" if shutil.which("g++") else "needs g++"


@contextmanager
def fake_mode() -> Iterator[None]:
    """Tensors made are fake, and real ones become so when an op meets them; no autograd.

    Make modules and layouts before and move them within, modules in one `.to`: PyTorch cannot always move parameters
    that are fake already, and `StudyLayout.select` needs real rows.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


@contextmanager
def guarded_process(folder: Path) -> Iterator[Callable[..., Any]]:
    """Calls a function of a module in a process that has the guard; arguments and result are pickled."""
    library = folder / "cuda_guard.so"
    _compile(Path(__file__).with_name("cuda_guard.cpp"), library)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_register, initargs=(library,)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _register(library: Path) -> None:
    torch.ops.load_library(library)


def _compile(source: Path, library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-I{path}" for path in include_paths()),
            str(source),
            *(f"-L{path}" for path in library_paths()),
            "-lc10",
            "-o",
            str(library),
        ],
        check=True,
    )
