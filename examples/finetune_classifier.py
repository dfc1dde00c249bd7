"""Fine-tune a classifier on the studies of a store that have a label.

    python examples/finetune_classifier.py --store stores/train --label glioma --model runs/demo/model --out runs/glioma

Begins with a pretrained model, puts a linear layer on its study encoder, and trains both: the encoder at a tenth of the
layer's rate. A fifth of the studies is kept aside; its AUC is printed after every epoch. The split is by study: where
patients come back, or the model was pretrained on the same studies, keep others aside (`hlip store split --list`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hlip import HLIPModel, pack
from hlip.evaluate.metrics import macro_auc
from hlip.model.encoder import StudyEncoder
from hlip.read.safe import finite_number
from hlip.store.store import Store, StudyDataset


class Classifier(nn.Module):
    """One logit for every study of a batch."""

    def __init__(self, encoder: StudyEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.num_features, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, dataset: StudyDataset, studies: Sequence[int], seed: int | None = None) -> Tensor:
        """studies: indices. With a seed, a study with more scans than the data set gives has them drawn."""
        batch = pack([dataset[i if seed is None else (i, seed)] for i in studies], self.encoder.config.patch_size)
        features = self.encoder(batch.to(self.head.weight.device))[:, 0]  # (B, P, F): of the cls row
        return self.head(features)[:, 0]


def batches(studies: np.ndarray, size: int) -> Iterator[list[int]]:
    for first in range(0, len(studies), size):
        yield studies[first : first + size].tolist()


@torch.inference_mode()
def auc(model: Classifier, store: Store, studies: np.ndarray, labels: np.ndarray, size: int) -> float:
    """With all scans of every study."""
    model.eval()
    dataset = StudyDataset(store)
    scores = torch.cat([model(dataset, part) for part in batches(studies, size)])
    return macro_auc(labels[studies, None], scores.cpu().numpy()[:, None])


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a classifier on the studies of a store that have a label.")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--label", required=True, help="of the store: 0 or 1")
    parser.add_argument("--model", required=True, help="what HLIPModel.from_pretrained reads")
    parser.add_argument("--out", type=Path, required=True, help="folder for classifier.pt")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_scans", type=int, default=10, help="of a study in a training step, drawn anew")
    parser.add_argument("--lr", type=finite_number, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    store = Store(args.store)
    names, table = store.labels
    if args.label not in names:
        parser.error(f"--label {args.label}: the store has {', '.join(names) or 'no labels'}")
    labels = table[:, names.index(args.label)]
    studies = rng.permutation(np.flatnonzero(~np.isnan(labels)))
    held_out, training = np.split(studies, [len(studies) // 5])

    model = Classifier(HLIPModel.from_pretrained(args.model).visual.trunk).to(args.device)
    groups = [
        {"params": model.encoder.parameters(), "lr": args.lr / 10},
        {"params": model.head.parameters(), "lr": args.lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    weight = torch.tensor((labels[training] == 0).sum() / max(1, (labels[training] == 1).sum()), device=args.device)
    dataset = StudyDataset(store, args.max_scans)
    print(f"{len(training)} studies to train on, {len(held_out)} held out; positive: {np.nanmean(labels):.0%}")
    for epoch in range(args.epochs):
        model.train()
        losses = []
        for part in batches(rng.permutation(training), args.batch_size):
            targets = torch.from_numpy(labels[part]).to(args.device, torch.float32)
            logits = model(dataset, part, seed=int(rng.integers(2**31)))
            loss = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight.float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        area = auc(model, store, held_out, labels, args.batch_size)
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, held-out AUC {area:.3f}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.out / "classifier.pt")
    print(args.out / "classifier.pt")


if __name__ == "__main__":
    main()
