"""How the packages are installed, and how the native library is built.

The library is plain C++ with a C interface: no headers of Python or PyTorch, no link to an OpenMP runtime (the one that
torch loads is used). It is optional: where it cannot be built, all else installs. Whether a build was tried and failed
shows in `pip install -v`, and `python -m hlip_kernels.env` says if the library is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("hlip_kernels/native/src")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-g0"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]
INTERFACE = "".join((SOURCES / name).read_text("utf-8") for name in ("attention.h", "linear.h", "norm_gelu.h"))
FLAGS += [f"-DHLIP_ABI=0x{hashlib.sha256(INTERFACE.encode()).hexdigest()[:15]}"]  # see abi.cpp
CALLERS = shlex.split(os.environ.get("CXXFLAGS", ""))  # after ours, to prevail
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
ISA_FLAGS = {  # by the end of a source's name; others are compiled for any processor
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def native_sources() -> list[Path]:
    """Of the instruction sets that this machine's kind has."""
    sources = sorted(SOURCES.glob("*.cpp"))
    if platform.machine() in ("x86_64", "AMD64"):
        return sources
    return [path for path in sources if path.stem.rpartition("_")[2] not in ISA_FLAGS]


class BuildNative(build_ext):
    """Compiles each source with the flags of its instruction set, and links without Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        objects = []
        for path in native_sources():
            flags = [*FLAGS, *ISA_FLAGS.get(path.stem.rpartition("_")[2], []), *CALLERS]
            self.announce(f"compiling {path}: {' '.join(flags)}", 2)
            objects += self.compiler.compile(
                [str(path)], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), libraries=["m"])


class AnyPython(bdist_wheel):
    """The library serves every version of Python: a wheel is of a platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


INIT = Path(__file__).parent / "hlip_kernels" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+?)"', INIT.read_text("utf-8"), re.MULTILINE)
assert VERSION, "hlip_kernels/__init__.py has no __version__"

NATIVE = Extension(
    "hlip_kernels.native.libhlip_native",
    sources=[str(path) for path in native_sources()],
    depends=[str(path) for path in SOURCES.glob("*.h")],
    optional=True,
)

EXTRAS = {
    "hub": ["huggingface-hub>=0.34"],
    "io": ["nibabel>=5.2", "pydicom>=3", "SimpleITK>=2.3", "pyarrow>=15"],
    "scale": ["ray>=2.9", "submitit>=1.5"],
    # transformers that ran: 4.56.0, 4.57.6, 5.0.0, 5.24.0; docs/install.md tells of hostile folders
    "text": ["ftfy>=6", "transformers>=4.56"],
    "train": ["tensorboard>=2.14"],
    "eval": ["scikit-learn>=1.4"],
    "viz": ["matplotlib>=3.7", "pillow>=9", "pandas>=2.2", "jinja2>=3.1"],
    "baselines": ["open_clip_torch>=3"],  # with timm, and the torchvision that fits your torch
    "demo": ["nilearn>=0.11", "scipy>=1.10"],
    # Both are built for one torch: take the release that fits yours. flash-attn-4 is left to the user: it has betas
    # only, and its folder flash_attn/cute is in flash-attn, too, in an older form.
    "gpu": ["flash-attn>=2.7", "xformers>=0.0.29"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings>=0.28", "mkdocstrings-python>=1.14"],
    "fuzz": ["atheris>=3"],  # wheels for Linux and Python 3.11 or newer
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "coverage>=7.10",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.14",
        "types-PyYAML",
        "monai>=1.4",
        "einops>=0.6",  # MONAI's ViT needs it and does not ask for it
        "triton; platform_system == 'Linux'",
        "xformers>=0.0.35; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
}
EXTRAS["dev"] += EXTRAS["scale"] + EXTRAS["docs"]
NOT_IN_ALL = ("baselines", "dev", "docs", "fuzz", "gpu", "scale")
EXTRAS["all"] = sorted({req for name, reqs in EXTRAS.items() if name not in NOT_IN_ALL for req in reqs})

setup(
    name="hlip-kernels",
    version=VERSION[1],
    description="Hierarchical attention over packed 3D medical imaging studies, and language-image pre-training on it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords="attention medical imaging CT MRI vision-language pre-training",
    project_urls={"Paper": "https://arxiv.org/abs/2505.21862"},
    python_requires=">=3.10",
    packages=find_packages(include=["hlip_kernels*", "hlip*"]),
    ext_modules=[NATIVE] if sys.platform == "linux" else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
    package_data={
        "hlip_kernels": ["py.typed", "evidence/README.md", "evidence/*.json"],
        "hlip": ["py.typed", "evaluate/benchmarks/*.yaml", "explain/*.html", "train/recipes/*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
        "pyyaml>=6",
        "filelock>=3.12",
        "cattrs>=25.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hlip=hlip.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
)
