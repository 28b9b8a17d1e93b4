"""k-means, to start a codebook on the data instead of at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.core.ranks import broadcast
from vistok.quantizers.search import best_codes, code_bias


@torch.no_grad()
def kmeans(
    points: Tensor, num_clusters: int, iterations: int = 10, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from randomly chosen points.

    An empty cluster keeps its mean. With fewer points than clusters some points are chosen more
    than once. Memory is O((N + K)·d): the N×K distances are never kept.

    Args:
        points: `(N, d)` float32, N >= 1, the same on every rank.
        num_clusters: K.
        iterations: number of assign-and-average rounds; 0 returns the chosen points.
        cosine: assign by the dot product and put the means on the unit sphere. The points
            must have unit length.

    Returns:
        Means `(K, d)` float32 and the number of points `(K,)` int64 nearest to each, identical
        on every rank.
    """
    num_points = points.shape[0]
    if num_points >= num_clusters:
        chosen = torch.randperm(num_points, device=points.device)[:num_clusters]
    else:
        chosen = torch.randint(num_points, (num_clusters,), device=points.device)
        chosen[:num_points] = torch.randperm(num_points, device=points.device)
    means = broadcast(points[chosen].contiguous())

    def assign(means: Tensor) -> Tensor:
        return best_codes(points, means, None if cosine else code_bias(means))

    for _ in range(iterations):
        ids = assign(means)
        counts = torch.bincount(ids, minlength=num_clusters)
        sums = torch.zeros_like(means).index_add_(0, ids, points)
        average = sums / counts.clamp(min=1)[:, None]
        if cosine:
            average = F.normalize(average, dim=-1, eps=1e-6)
        means = torch.where(counts[:, None] > 0, average, means)
    means = broadcast(means)
    return means, torch.bincount(assign(means), minlength=num_clusters)
