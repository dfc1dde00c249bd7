"""A driver for Triton without a card: every launch is specialised, compiled to machine code and recorded.

    launches = install("sm_90")  # before the first launch of the process, in which TRITON_INTERPRET is not set

From then on the kernels take tensors on the CPU for those of a GPU of that architecture: everything runs but the
kernels, so that what they should write keeps what was in its memory. Triton 3.6.0 and 3.9.0 were tried.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from hlip_kernels import tiles
from hlip_kernels.backends import triton as backend

SHARED_BYTES = {  # of one program, at most: CUDA C++ Programming Guide, table of technical specifications
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
}  # fmt: skip
GRID_LIMITS = 2**31 - 1, 65535, 65535


class Memory(NamedTuple):
    """A tensor that a kernel was given: the kernel gets the address alone. begin, end: of the memory it lies in."""

    address: int
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    end: int


def memory_of(x: Tensor) -> Memory:
    storage = x.untyped_storage()
    begin = storage.data_ptr()
    return Memory(x.data_ptr(), x.device, x.dtype, tuple(x.shape), x.stride(), begin, begin + storage.nbytes())


@dataclass(frozen=True)
class Launch:
    """
    args: by name, in the kernel's order; a tensor as `Memory`.
    divisible: names of those that the kernel was compiled for as multiples of 16.
    constants: those that it was compiled for as they are, by name.
    options: the compiler's, such as num_warps and maxnreg, and what it says of the kernel, such as shared (bytes).
    cubin: the machine code, for `machine_code.read_cubin` and `sass`.
    device: the current one. stream: its current one.
    """

    name: str
    grid: tuple[int, int, int]
    args: dict[str, Any]
    divisible: frozenset[str]
    constants: dict[str, Any]
    options: dict[str, Any]
    cubin: bytes
    device: int
    stream: int


class Launches(list[Launch]):
    """binaries: what was loaded, by its handle: one for every specialisation and device. device: the current one of any
    number."""

    def __init__(self) -> None:
        super().__init__()
        self.binaries: dict[int, bytes] = {}
        self.device = 0


def install(architecture: str = "sm_90") -> Launches:
    """Make this process's launches go nowhere but into the list that is returned.

    Raises:
        RuntimeError: kernels run in the interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing would be launched. Unset it before Triton is imported.")
    launches = Launches()
    triton.runtime.driver.set_active(_Driver(launches, architecture))

    def exchange(device: int) -> int:
        """Do what CUDA's function of `torch.cuda.device` does; a negative number changes nothing."""
        before = launches.device
        launches.device = device if device >= 0 else before
        return before

    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = exchange
    own, supported = tiles.architecture, backend.norm_not_supported_reasons

    def reasons(device: str, *dtypes: torch.dtype) -> list[str]:
        return supported("cuda" if device == "cpu" else device, *dtypes)

    for module in list(sys.modules.values()):  # also where it was imported by name
        if vars(module).get("architecture") is own:
            module.architecture = lambda device_index=0: architecture  # type: ignore[attr-defined]
        if vars(module).get("norm_not_supported_reasons") is supported:
            module.norm_not_supported_reasons = reasons  # type: ignore[attr-defined]
    return launches


class CompilerOnly:
    """A driver of Triton for an architecture that need not be here. A launch compiles the kernel and does no more."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.utils = self
        self.binary = b""  # the last one that was made ready for a launch
        self.properties = {"max_shared_mem": 2**31 - 1}  # no limit: the GPU says whether there is enough

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Return handles, registers and spills, which nobody reads, and a limit of threads that no kernel exceeds."""
        self.binary = binary
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Driver(CompilerOnly):
    """Records the launches, too."""

    def __init__(self, launches: Launches, architecture: str) -> None:
        super().__init__(GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32))
        self.launches = launches
        self.properties = {"max_shared_mem": SHARED_BYTES[architecture], "max_num_regs": 65536, "warpSize": 32}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Make the launcher of one kernel, with the arguments that Triton gives its own."""
        launches, names = self.launches, source.fn.arg_names
        divisible = frozenset(names[path[0]] for path, said in source.attrs.items() if ["tt.divisibility", 16] in said)
        constants = {names[path[0]]: value for path, value in source.constants.items()}

        def launch(
            x: int, y: int, z: int, stream: int, function: int, _packed: Any, _facts: Any, _enter: Any, _exit: Any,
            *args: Any,
        ) -> None:  # fmt: skip
            grid = x, y, z
            if not all(0 < size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
                raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {grid}")
            values = (memory_of(value) if isinstance(value, Tensor) else value for value in args)
            by_name, cubin = dict(zip(names, values, strict=True)), launches.binaries[function]
            facts = divisible, constants, metadata._asdict(), cubin, launches.device, stream
            launches.append(Launch(source.fn.__name__, grid, by_name, *facts))

        return launch

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """As the base, with handles of its own."""
        handle = len(self.launches.binaries) + 1
        self.launches.binaries[handle] = binary
        return handle, handle, 0, 0, 1024

    def get_current_device(self) -> int:
        return self.launches.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device
