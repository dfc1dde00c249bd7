"""Calls backend flash4 on fake CUDA tensors, for which flash-attn-4 compiles its kernels as on a GPU; prints facts.

    FLASH_ATTENTION_ARCH=sm_90 CUTE_DSL_ARCH=sm_90a FLASH_ATTENTION_NUM_SMS=132 python flash4_job.py

A program of its own: the architecture is read when flash-attn-4 is imported, and its package flash_attn is another one
than that of flash-attn 2.
"""

from __future__ import annotations

import functools
import json
import site
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

site.addsitedir(str(Path(sys.prefix, "flash-attn-4")))  # the compiler's packages are found by a file .pth there

from copies import Copies
from hlip_kernels.backends import BACKENDS, not_supported_reasons
from hlip_kernels.backends.base import QKV, Spans

HEADS, HEAD_DIM, SCALE = 2, 64, 0.3


def spans(groups: int, longest: int, used: bool = False) -> Spans:
    def bounds(n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int32, device="cuda")

    return Spans(bounds(groups + 1), [], longest, bounds(groups) if used else None)


def view(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: its memory, and the view of it."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


CALLS: list[dict[str, Any]] = []


def record_calls() -> None:
    """Have what the library's two functions are given noted before they run."""
    from flash_attn.cute import interface

    def recorded(name: str) -> Any:
        function = getattr(interface, name)

        @functools.wraps(function)
        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **given: Any) -> Any:
            tensors = {"q": q, "k": k, "v": v, **{key: given[key] for key in ("dq", "dk", "dv") if key in given}}
            CALLS.append({"name": name, "views": {key: view(x) for key, x in tensors.items()}})
            return function(q, k, v, *rest, **given)

        return call

    for name in ("_flash_attn_fwd", "_flash_attn_bwd"):
        setattr(interface, name, recorded(name))


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, grads: QKV) -> dict[str, Any]:
    backend = BACKENDS["flash4"]
    CALLS.clear()
    with Copies(q.numel()) as copies:
        out, lse = backend.forward(q, k, v, queries, keys, SCALE)
        backend.backward(grads, torch.empty_like(out), q, k, v, out, lse, queries, keys, SCALE, False)
    given = {"q": q, "k": k, "v": v, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    passed = [(call["name"], key, lies == view(given[key])) for call in CALLS for key, lies in call["views"].items()]
    return {
        "out": out.shape,
        "contiguous": out.is_contiguous(),
        "lse": lse.shape,
        "passed": passed,
        "copies": copies.seen,
    }


def main() -> None:
    facts: dict[str, Any] = {}
    with FakeTensorMode(), torch.no_grad():
        facts["reasons"] = not_supported_reasons("flash4", "cuda", torch.bfloat16, HEAD_DIM)
        qkv, grad = (torch.empty(1000, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        record_calls()
        groups = spans(5, 300)
        facts["self"] = attend(*qkv.unbind(1), groups, groups, grad.unbind(1))
        # queries of 300 studies, and patches behind two prefix rows; a fake tensor of CUDA cannot be sliced by [] here
        q, k, v, dq, dk, dv = (x.narrow(0, 2, 998) for x in (*qkv.unbind(1), *grad.unbind(1)))
        q, dq = q.narrow(0, 0, 700), dq.narrow(0, 0, 700)
        # longest: with one tile a group, flash-attn-4 asks the driver for what fits on the GPU
        facts["cross"] = attend(q, k, v, spans(300, 300), spans(300, 300, used=True), (dq, dk, dv))
    print(json.dumps(facts))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
