"""`python -m hlip_kernels.env`: what this machine has, and which attention backends can run on it."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from .backends import BACKENDS, choose_backend, not_supported_reasons
from .configs import table_path, user_tiles
from .native import native


def report() -> str:
    """Versions, devices, and every backend with the reasons if it cannot run, as text."""
    packages = ("hlip-kernels", "torch", "triton", "flash-attn", "xformers")
    lines = [f"{'python':<14}{platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:<14}{_version(name)}" for name in packages]
    lines.append(f"{'cpu':<14}{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    lines.append(f"{'native':<14}{native().reason or native().isa}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"{'gpu':<14}{', '.join(gpus) or 'none'}")
    lines.append(f"{'tiles':<14}{_tiles()}")
    kinds = [("cpu", torch.float32), ("cpu", torch.bfloat16), *([("cuda", torch.bfloat16)] if gpus else [])]
    for device, dtype in kinds:
        lines.append("\n" + describe_backends(device, dtype, 64))
    return "\n".join(lines)


def describe_backends(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Which backend attention takes on tensors of this kind, and why each of the others does not run."""
    auto = choose_backend("auto", device, dtype, head_dim)
    lines = [f"attention on {device} in {str(dtype).removeprefix('torch.')} (auto: {auto})"]
    for name in BACKENDS:
        reasons = not_supported_reasons(name, device, dtype, head_dim)
        lines.append(f"  {name:<12}{'; '.join(reasons) or 'can run'}")
    return "\n".join(lines)


def _tiles() -> str:
    """Which tile table the Triton kernels use."""
    try:
        rows = len(user_tiles())
    except ValueError as error:
        return str(error)
    if not rows:
        return f"built-in; none in {table_path()}"
    return f"{rows} row{'s' * (rows > 1)} from {table_path()}, the others built-in"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
