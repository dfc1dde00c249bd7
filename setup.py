from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "io": ["nibabel>=5", "pydicom>=3", "SimpleITK>=2.3", "pyarrow>=15"],
    "scale": ["ray>=2.9", "submitit>=1.5"],
    "text": ["transformers>=4.56"],
    "train": ["tensorboard>=2.14", "jsonargparse[signatures]>=4.30"],
    "eval": ["scikit-learn>=1.3"],
    "viz": ["matplotlib>=3.7", "pillow>=9"],
    "baselines": ["open_clip_torch>=3"],  # with timm, and the torchvision that fits your torch
    "demo": ["nilearn>=0.11", "scipy>=1.10"],
    "gpu": ["flash-attn>=2.7", "xformers>=0.0.29"],  # both are built for one torch: take the release that fits yours
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings>=0.28", "mkdocstrings-python>=1.14"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.5",
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
NOT_IN_ALL = ("baselines", "dev", "docs", "gpu", "scale")
EXTRAS["all"] = sorted({req for name, reqs in EXTRAS.items() if name not in NOT_IN_ALL for req in reqs})

setup(
    name="hlip-kernels",
    version="0.1.0",
    description="Hierarchical attention over packed 3D medical imaging studies, and language-image pre-training on it",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["hlip_kernels*", "hlip*"]),
    package_data={"hlip_kernels": ["py.typed"], "hlip": ["py.typed", "tasks/benchmarks/*.yaml", "tasks/*.html"]},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "safetensors>=0.4",
        "huggingface-hub>=0.27",
        "tqdm>=4.66",
        "pyyaml>=6",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hlip=hlip.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Programming Language :: Python :: 3",
    ],
)
