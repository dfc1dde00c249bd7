"""The report that people paste into issues: whole, and without what is private."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from hlip_kernels import env
from hlip_kernels.native import Native


def test_optional_packages_are_named_installed_or_not() -> None:
    facts = dict(line.split(maxsplit=1) for line in env.report().partition("\n\n")[0].splitlines())
    assert facts["torch"] == torch.__version__
    for name in ("triton", "nibabel", "flash-attn", "open_clip_torch", "ray", "transformers"):
        try:
            expected = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            expected = "not installed"
        assert facts[name] == expected
    assert not {"pytest", "mkdocs"} & facts.keys()


def test_secrets_and_folders_are_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "somebody"
    private = {"HF_TOKEN": "hf_secret", "HF_HOME": f"{home}/hub", "XDG_CACHE_HOME": f"{home}/cache", "HOME": str(home)}
    for name, value in {**private, "OMP_NUM_THREADS": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(env, "native", lambda: Native(None, "", f"{env.__file__}: no such file"))
    monkeypatch.setattr(env, "table_path", lambda: home / "cache" / "tiles.json")
    text = env.report()
    assert "OMP_NUM_THREADS=3, " in text
    assert "XDG_CACHE_HOME is set, HF_HOME is set" in text
    assert "none in $XDG_CACHE_HOME/tiles.json" in text
    assert "(packages)/hlip_kernels/env.py: no such file" in text
    for secret in ("hf_secret", "somebody", str(Path(env.__file__).parent)):
        assert secret not in text


@pytest.mark.parametrize(
    ("own", "limits", "least"),
    [
        ("/job/step", {"": "max", "job": "4096", "job/step": "8192"}, 4096),
        ("/job/step", {"job/step": "8192"}, 8192),
        ("/", {"": "max"}, None),
        ("/job", {}, None),
    ],
)
def test_memory_is_limited_by_all_groups_above(
    own: str, limits: dict[str, str], least: int | None, tmp_path: Path
) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text(f"1:name=systemd:/elsewhere\n0::{own}\n")
    for group, limit in limits.items():
        (tmp_path / "fs" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / group / "memory.max").write_text(limit + "\n")
    assert env.memory_limit(tmp_path / "fs", membership) == least
    assert env.memory_limit(tmp_path / "fs", tmp_path / "none") is None
