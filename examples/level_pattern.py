"""A study encoder with levels of your own, and what each costs.

    python examples/level_pattern.py

`levels` is a tuple of "slice", "scan" and "study", one for each layer; `level_pattern` and `place_levels` make the
usual ones. The weights have the same shapes in every pattern.
"""

from __future__ import annotations

import torch

from hlip.model.config import VisionConfig
from hlip.model.encoder import StudyEncoder
from hlip.model.levels import level_pattern, place_levels
from hlip.study import pack
from hlip_kernels import Level, StudyLayout

PATTERNS: dict[str, tuple[Level, ...]] = {
    "as published": level_pattern("scan+study", 6, subsets=2),
    "three levels": level_pattern("slice+scan+study", 6, subsets=2),
    "one look at the end": place_levels("scan", "study", depth=6, count=1, place="last"),
    "plain ViT": ("study",) * 6,
    "by hand": ("slice", "slice", "study", "scan", "slice", "study"),
}


def pairs(layout: StudyLayout, level: Level) -> int:
    """Products of a query with a key, in a layer of one head."""
    rows = layout.seqlens(level) + layout.num_prefix
    return int((rows**2).sum())


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def scan(slices: int) -> torch.Tensor:
        return torch.randint(0, 256, (slices, 32, 32), dtype=torch.uint8, generator=generator)

    batch = pack([[scan(16), scan(16), scan(24)], [scan(8)]], patch_size=(4, 8, 8))
    plain = 6 * pairs(batch.layout, "study")
    for name, levels in PATTERNS.items():
        config = VisionConfig(width=96, heads=3, patch_size=(4, 8, 8), grid=(4, 4, 4), levels=levels)
        torch.manual_seed(0)
        encoder = StudyEncoder(config).eval()
        with torch.inference_mode():
            studies = encoder(batch)  # (2, 1, 96)
        cost = sum(pairs(batch.layout, level) for level in levels)
        print(
            f"{name:<20} {' '.join(levels):<36} {tuple(studies.shape)}  {cost / plain:.0%} of a plain ViT's attention"
        )


if __name__ == "__main__":
    main()
