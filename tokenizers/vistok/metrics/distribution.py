"""Distances between the distributions of originals and reconstructions, by a network's vectors."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor

from vistok.core.errors import DataError
from vistok.core.registry import name_of, register
from vistok.core.signatures import check_values
from vistok.core.terminal import counted
from vistok.core.values import Count, Index
from vistok.metrics.image import ImageMetric
from vistok.nn.frozen import Frozen
from vistok.nn.network import Network

_LAST = torch.iinfo(torch.int64).max


class DistributionMetric(ImageMetric):
    """A metric of the vectors that a network gives of all images.

    Metrics that are built with the same network object share its forward.

    Args:
        network: gives the vectors.
    """

    higher_is_better = False

    def __init__(self, network: Network) -> None:
        super().__init__()
        network.require("vectors")
        self.network = Frozen(network)
        self.dim = network.dim

    def options(self) -> dict[str, Any]:
        """Return the network."""
        return {"network": self.network.module.identity()}  # type: ignore[operator]

    def identity(self) -> dict[str, Any]:
        """Return what decides its value; see `ImageMetric`."""
        return {**super().identity(), "grows_with": "images"}

    def vectors_of(self, images: Tensor, what: str) -> Tensor:
        """Return the vectors `(B, dim)` of uint8 images.

        Raises:
            DataError: if some are not finite.
        """
        network: Network = self.network.module  # type: ignore[assignment]
        found = network.recall("vectors", images, network.vectors)
        if not found.isfinite().all():
            wrong = int((~found.isfinite()).any(dim=1).sum())
            raise DataError(
                f"{self._named()}: {network.name} gives NaN or infinity for {wrong} of "
                f"{len(images)} {what}"
            )
        return found

    def take(self, originals: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the vectors of both sides, checked; None of an empty batch."""
        self.check_pair(originals, reconstructions)
        if not len(originals):
            return None
        a = self.vectors_of(originals, "originals")
        return a, self.vectors_of(reconstructions, "reconstructions")

    def _named(self) -> str:
        return f"{name_of(type(self), 'metric')} by {self.network.module.name}"

    def _need(self, images: int, least: int) -> None:
        if images < least:
            raise DataError(
                f"{self._named()}: found {counted(images, 'image')}; needs {least} or more"
            )


@register("frechet", kind="metric")
class FrechetDistance(DistributionMetric):
    """Fréchet distance between Gaussians fitted to the vectors: FID, FD-DINOv2, FD-lite0.

    Sums of vectors and of their products are float64, so memory does not grow with the number of
    images. Its expected value falls with the number N of images, about as D + c / N: compare at
    equal N alone. Images are split in halves by a hash of their pixels, so `corrected` extrapolates
    from N / 2 and N to infinitely many: 2 D(N) - D(N / 2), as FID-infinity does with more points
    (Chong and Forsyth 2020, https://arxiv.org/abs/1911.07023). It may be negative, and where N is
    not a few times the dimension it is still too large.

    Paper: Heusel et al. 2017, https://arxiv.org/abs/1706.08500.

    Args:
        network: gives the vectors.
        corrected: also keep the sums that the corrected value needs, twice the memory.
    """

    def __init__(self, network: Network, corrected: bool = True) -> None:
        super().__init__(network)
        self.corrected = corrected
        self.halves = 2 if corrected else 1
        self.add_state("count", torch.zeros(self.halves, dtype=torch.float64), dist_reduce_fx="sum")
        for side in ("original", "reconstructed"):
            for name, shape in (("sum", (self.dim,)), ("product", (self.dim, self.dim))):
                zeros = torch.zeros(self.halves, *shape, dtype=torch.float64)
                self.add_state(f"{side}_{name}", zeros, dist_reduce_fx="sum")

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        taken = self.take(originals, reconstructions)
        if taken is None:
            return
        half = hashes(originals, 0).to(originals.device) % self.halves
        for side, vectors in zip(("original", "reconstructed"), taken, strict=True):
            sums, products = getattr(self, f"{side}_sum"), getattr(self, f"{side}_product")
            for number in range(self.halves):
                x = vectors[half == number].double()
                sums[number] += x.sum(dim=0)
                products[number].addmm_(x.T, x)
        self.count += torch.bincount(half, minlength=self.halves)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return "distance", "corrected" (of four images or more) and "images", their number."""
        count: Tensor = self.count  # type: ignore[assignment]
        images = int(count.sum())
        self._need(images, 2)
        if images <= self.dim:
            warnings.warn(
                f"{self._named()}: {counted(images, 'image')} for {self.dim} dimensions: the "
                "covariances have no full rank and the distance is far too large; compare at equal "
                f"numbers of images alone, or take more than {self.dim}",
                stacklevel=2,
            )
        whole = self._distance(list(range(self.halves)))
        result = {"distance": whole}
        if self.corrected and count.min() >= 2:
            parts = torch.stack([self._distance([half]) for half in range(2)])
            # Of halves of unequal size: the line through D(N) and the mean, at 1 / N = 0.
            inverse, mean = 1 / images, (1 / count).mean()
            result["corrected"] = whole - (parts.mean() - whole) * inverse / (mean - inverse)
        return {**result, "images": torch.tensor(images)}

    def _distance(self, halves: list[int]) -> Tensor:
        count = self.count[halves].sum()  # type: ignore[index]
        moments = []
        for side in ("original", "reconstructed"):
            mean = getattr(self, f"{side}_sum")[halves].sum(0) / count
            product = getattr(self, f"{side}_product")[halves].sum(0)
            moments += [mean, (product - count * torch.outer(mean, mean)) / (count - 1)]
        return frechet(*moments)


def frechet(mean: Tensor, covariance: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Tensor:
    """Return the squared Fréchet distance of two Gaussians, 0 or more; all float64.

    The trace of the root of the product is that of the root of a symmetric matrix of the same
    eigenvalues, S1^(1/2) S2 S1^(1/2). What rounding leaves of eigenvalues that are zero is cut off:
    the root would make much of it.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * _floored(values).sqrt() @ vectors.T
    product = root @ covariance_2 @ root
    trace = _floored(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum()
    distance = (mean - mean_2).square().sum() + covariance.trace() + covariance_2.trace()
    return (distance - 2 * trace).clamp(min=0)


def _floored(values: Tensor) -> Tensor:
    floor = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values, 0)


class KeptVectors(DistributionMetric):
    """A metric that needs the vectors themselves, of a bounded number of images.

    Kept are the images with the smallest hashes of their pixels: the same ones in any order of the
    images, on any number of ranks.

    Args:
        network: gives the vectors.
        limit: images to keep at most; they take `8 * limit * dim` bytes.
        seed: another one keeps other images, if there are more than `limit`.
    """

    def __init__(self, network: Network, limit: Count = 5000, seed: Index = 0) -> None:
        super().__init__(network)
        check_values(KeptVectors, locals())
        self.limit, self.seed = limit, seed
        self.add_state("seen", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("order", torch.full((limit,), _LAST), dist_reduce_fx=None)
        for side in ("original", "reconstructed"):
            self.add_state(side, torch.zeros(limit, self.dim), dist_reduce_fx=None)

    def options(self) -> dict[str, Any]:
        """Return the network, and which images are kept."""
        return {**super().options(), "limit": self.limit, "seed": self.seed}

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        taken = self.take(originals, reconstructions)
        if taken is None:
            return
        order = torch.cat([self.order, hashes(originals, self.seed).to(self.order.device)])  # type: ignore
        first = order.argsort(stable=True)[: self.limit]
        self.order = order[first]
        for side, vectors in zip(("original", "reconstructed"), taken, strict=True):
            setattr(self, side, torch.cat([getattr(self, side), vectors.float()])[first])
        self.seen += len(originals)  # type: ignore[operator]

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return the vectors of both sides, `(n, dim)` float64, of the images of all ranks."""
        order: Tensor = self.order.reshape(-1)  # type: ignore[operator,assignment]
        first = order.argsort(stable=True)[: self.limit]
        first = first[order[first] < _LAST]
        a, b = (getattr(self, s).reshape(-1, self.dim) for s in ("original", "reconstructed"))
        return a[first].double(), b[first].double()


@register("kid", kind="metric")
class KernelDistance(KeptVectors):
    """KID: squared maximum mean discrepancy of the vectors under a cubic kernel, unbiased.

    The kernel is (x y / dim + 1)^3. All pairs of the images that are kept count at once, where
    others average over random subsets: the same expected value with less noise. It may be negative.

    Paper: Binkowski et al. 2018, https://arxiv.org/abs/1801.01401.

    Args:
        network: gives the vectors.
        limit: see `KeptVectors`.
        seed: see `KeptVectors`.
    """

    def identity(self) -> dict[str, Any]:
        """Return what decides its value; its expected value does not depend on their number."""
        return {**super().identity(), "grows_with": None}

    def compute(self) -> dict[str, Tensor]:
        """Return "distance" and "images", the number that it was computed of."""
        x, y = self.kept()
        n = len(x)
        self._need(n, 2)
        own = sum(self._sum(v, v) - self._diagonal(v) for v in (x, y))
        distance = own / (n * (n - 1)) - 2 * self._sum(x, y) / n**2
        return {"distance": distance, "images": torch.tensor(n)}

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        rows = [(part @ y.T / self.dim + 1).pow(3).sum() for part in x.split(1024)]
        return torch.stack(rows).sum()

    def _diagonal(self, x: Tensor) -> Tensor:
        return (x.square().sum(dim=1) / self.dim + 1).pow(3).sum()


@register("precision_recall", kind="metric")
class PrecisionRecall(KeptVectors):
    """Share of reconstructions among the originals, and of originals among the reconstructions.

    An image is among others if its vector is no further from one of theirs than that one's k-th
    nearest neighbour.

    Paper: Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991.

    Args:
        network: gives the vectors.
        neighbors: k.
        limit: see `KeptVectors`.
        seed: see `KeptVectors`.
    """

    higher_is_better = True

    def __init__(
        self, network: Network, neighbors: Count = 3, limit: Count = 5000, seed: Index = 0
    ) -> None:
        super().__init__(network, limit, seed)
        check_values(PrecisionRecall, locals())
        self.neighbors = neighbors

    def options(self) -> dict[str, Any]:
        """Return the network, which images are kept, and k."""
        return {**super().options(), "neighbors": self.neighbors}

    def compute(self) -> dict[str, Tensor]:
        """Return "precision", "recall" and "images", the number that they were computed of."""
        originals, reconstructions = self.kept()
        self._need(len(originals), self.neighbors + 1)
        precision = self._inside(reconstructions, originals)
        recall = self._inside(originals, reconstructions)
        images = torch.tensor(len(originals))
        return {"precision": precision, "recall": recall, "images": images}

    def _inside(self, x: Tensor, others: Tensor) -> Tensor:
        """Return the share of x that lies in the neighbourhood of one of the others."""
        radii = [
            torch.cdist(part, others).kthvalue(self.neighbors + 1, dim=1).values  # itself, then k
            for part in others.split(1024)
        ]
        reach = torch.cat(radii)
        inside = [(torch.cdist(part, others) <= reach).any(dim=1) for part in x.split(1024)]
        return torch.cat(inside).double().mean()


@register("inception_score", kind="metric")
class InceptionScore(DistributionMetric):
    """Inception score of the reconstructions, and of their originals to compare with.

    The exponential of the mutual information of image and class, in one split over all images:
    published scores average over ten, and depend on their size. float64 sums, so memory does not
    grow with the number of images.

    Paper: Salimans et al. 2016, https://arxiv.org/abs/1606.03498.

    Args:
        network: gives class logits; the published score is by "inception".
    """

    higher_is_better = True

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        network.require("logits")
        with torch.no_grad():
            probe = next(network.parameters())
            classes = network.classify(probe.new_zeros(1, network.dim)).shape[1]
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for side in ("original", "reconstructed"):
            zeros = torch.zeros(classes, dtype=torch.float64)
            self.add_state(f"{side}_classes", zeros, dist_reduce_fx="sum")
            self.add_state(f"{side}_entropy", zeros[0].clone(), dist_reduce_fx="sum")

    def update(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Take in a batch; both `(B, C, H, W)` uint8."""
        taken = self.take(originals, reconstructions)
        if taken is None:
            return
        network: Network = self.network.module  # type: ignore[assignment]
        for side, vectors in zip(("original", "reconstructed"), taken, strict=True):
            with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
                logs = network.classify(vectors).double().log_softmax(dim=1)
            classes, entropy = getattr(self, f"{side}_classes"), getattr(self, f"{side}_entropy")
            classes += logs.exp().sum(dim=0)
            entropy -= (logs.exp() * logs).sum()
        self.count += len(originals)  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return "score" of the reconstructions, "original" of the originals, and "images"."""
        count: Tensor = self.count  # type: ignore[assignment]
        self._need(int(count), 1)
        scores = []
        for side in ("reconstructed", "original"):
            mean = getattr(self, f"{side}_classes") / count
            joint = -torch.special.xlogy(mean, mean).sum()
            scores.append((joint - getattr(self, f"{side}_entropy") / count).exp())
        return {"score": scores[0], "original": scores[1], "images": torch.tensor(int(count))}


def hashes(images: Tensor, seed: int) -> Tensor:
    """Return a number of each image `(B, C, H, W)` uint8, from its pixels alone; int64, 0 or more.

    Other than positions, it is the same on any rank and in any order of the images.
    """
    key = seed.to_bytes(8, "little")
    rows = images.detach().cpu().contiguous().flatten(1).numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8, key=key).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests])
