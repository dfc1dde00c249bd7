"""Linear layers on instruction sets, and how exact they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import use_native
from hlip.model.encoder import Mlp
from hlip_kernels import linear_of_norm, mlp_of_norm
from hlip_kernels.linear import linear
from hlip_kernels.native import native

WIDTH, HIDDEN = 24, 72
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _fill_new_memory_with_nan() -> object:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This processor's, or an emulated one's."""
    if native().isa != "amx":
        use_native(monkeypatch, request.getfixturevalue("emulated_native"))


def assert_as_exact(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Error at most 2x (results) or 3x (gradients) that of eager PyTorch, plus one rounding."""
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        errors = [float((x.double() - exact[name]).abs().max()) for x in (value, eager[name])]
        rounding = torch.finfo(value.dtype).eps * float(exact[name].abs().max())
        assert errors[0] <= (3 if name.startswith("d") else 2) * errors[1] + rounding, (name, errors, rounding)


class Layers(nn.Module):
    """What a block does to its rows, but for attention: with our functions, or with PyTorch's modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(2 * WIDTH, WIDTH)
        self.mlp = Mlp(WIDTH, HIDDEN)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, plain: bool) -> Tensor:
        y = self.norm(x)
        if plain:
            return self.proj(self.qkv(y)) + self.mlp(y)
        update = linear(self.proj, linear_of_norm(self.qkv, self.norm, x, y))
        return update + mlp_of_norm(self.mlp.fc1, self.mlp.fc2, self.norm, x, y)


def rows(length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)
