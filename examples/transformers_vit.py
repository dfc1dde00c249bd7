"""Attention over slices and studies inside a Vision Transformer of transformers, with its weights as they are.

    python examples/transformers_vit.py

Images are slices; two layers of three see a slice alone, the third the whole study. Use `ViTModel.from_pretrained` in
place of the small random model.
"""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTModel

from hlip_kernels import StudyLayout
from hlip_kernels.dropin import register_transformers


def main() -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=64, patch_size=16, hidden_size=96, num_hidden_layers=6, num_attention_heads=3, intermediate_size=192
    )
    model = ViTModel(config, add_pooling_layer=False).eval()

    slices_of_scans = [[5, 3], [4]]  # two studies: one of two scans, one of a single scan
    images = torch.randn(sum(map(sum, slices_of_scans)), 3, 64, 64)
    layout = StudyLayout.from_grids([[(d, 4, 4) for d in study] for study in slices_of_scans], num_prefix=1)

    with torch.inference_mode():
        before = model(images).last_hidden_state

        register_transformers()
        model.set_attn_implementation("hlip")
        # As it was: each image by itself.
        alone = model(images, layout=layout, level="slice").last_hidden_state
        print(f"slices alone, largest change: {(alone - before).abs().max():.1e}")

        # A layer with a level of its own keeps to it; the others take that of the call.
        for i, layer in enumerate(model.layers):
            layer.attention.hlip_level = "study" if i % 3 == 2 else "slice"
        joined = model(images, layout=layout).last_hidden_state
        print(f"every third layer within studies, largest change: {(joined - before).abs().max():.1e}")

        # A study's embedding: the mean over the cls rows of its slices.
        cls = joined[:, 0]
        studies = torch.stack([part.mean(0) for part in cls.split([sum(study) for study in slices_of_scans])])
    print(f"studies: {tuple(studies.shape)}")


if __name__ == "__main__":
    main()
