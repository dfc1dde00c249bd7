"""Arguments of direct calls into the backends, and of the native library."""

from __future__ import annotations

import pytest

from hlip_kernels import native as library
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import AttentionBackend

needs_library = pytest.mark.skipif(library.native().library is None, reason=library.native().reason)


@pytest.fixture(params=["native", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    if request.param == "native" and library.native().library is None:
        pytest.skip(library.native().reason)
    if request.param == "triton":
        pytest.importorskip("triton")
    return BACKENDS[request.param]
