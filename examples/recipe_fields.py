"""Measure how recipe fields move embeddings: python examples/recipe_fields.py runs/demo/model STUDY STUDY ..."""

import sys
from dataclasses import replace

import torch

import hlip

model = hlip.HLIPModel.from_pretrained(sys.argv[1]).eval()
usual = model.config.preprocess
assert usual.shape
resampled = replace(usual, size=usual.shape, crop=None, spacing=(7.0, 4.0, 4.0))


@torch.inference_mode()
def embed(recipe: hlip.Recipe) -> torch.Tensor:
    studies = [hlip.load_study(folder, recipe) for folder in sys.argv[2:]]
    return model.encode_image(hlip.pack(studies, model.config.vision.patch_size)).flatten(1)


for recipe, changes in (
    (usual, {"depth": "nearest-exact"}),
    (usual, {"rounding": "truncate"}),
    (usual, {"depth": "nearest-exact", "rounding": "truncate"}),  # as released models of brain MRI and head CT
    (resampled, {"lengths": "floor"}),
    (resampled, {"windowing": "last"}),
    (resampled, {"reorient": False}),
    (resampled, {"lengths": "floor", "windowing": "last", "reorient": False}),  # as released models of chest CT
):
    cosine = (embed(recipe) * embed(replace(recipe, **changes))).sum(1)
    print(f"{changes}: cosine {cosine.mean():.4f} on average, {cosine.min():.4f} at least")
