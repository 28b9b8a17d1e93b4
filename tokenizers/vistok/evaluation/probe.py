"""A linear probe: how much of an image's class its quantized latents tell a linear classifier."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from vistok.models.tokenizer import Tokenizer

_FOLDS = 5

_CHUNK = 64


@torch.no_grad()
def pooled_latents(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Return the mean quantized latent of each image, `(M, D)` float32, of ids `(M, N, Q)`."""
    pooled = []
    for start in range(0, len(ids), _CHUNK):
        part = torch.from_numpy(ids[start : start + _CHUNK]).to(tokenizer.device)
        quantized = tokenizer.quantizer.decode(part, tokenizer.encoder.grid)
        pooled.append(quantized.float().mean(dim=1).cpu())
    return torch.cat(pooled).numpy()


def linear_probe(features: np.ndarray, labels: np.ndarray) -> dict[str, Any] | str:
    """Return the accuracy of a linear classifier on images that it was not fitted to.

    Multinomial logistic regression on standardized features, by stratified cross-validation:
    every image is classified once, by a classifier fitted to the other folds.

    Args:
        features: `(M, D)`.
        labels: `(M,)` classes, -1 for none.

    Returns:
        `top1`, `chance` (always naming the most frequent class), `images`, `classes` and `folds`;
        or, in words, why there is nothing to measure.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    kept = np.isin(labels, classes[counts >= 2])
    folds = min(_FOLDS, int(counts[counts >= 2].min())) if kept.any() else 0
    if len(np.unique(labels[kept])) < 2:
        return "needs two or more classes with two or more labelled images each"
    x, y = features[kept], labels[kept]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = np.asarray(cross_val_predict(model, x, y, cv=split))
    return {
        "top1": float(np.mean(found == y)),
        "chance": float(np.unique(y, return_counts=True)[1].max() / len(y)),
        "images": len(y),
        "classes": len(np.unique(y)),
        "folds": folds,
    }
