"""Embed one NIfTI file: python examples/embed_nifti.py runs/demo/model t1.nii.gz"""

import sys

import hlip

model = hlip.HLIPModel.from_pretrained(sys.argv[1])
study = hlip.load_study(sys.argv[2:], model.config.preprocess)
batch = hlip.pack([study], model.config.vision.patch_size)
embedding = model.encode_image(batch)  # (1, E), or (1, P, E) of a model with several embeddings; unit length
print(study.uid, tuple(embedding.shape), embedding.flatten()[:4].tolist())
