"""Show which metrics order degradations of photographs as their strength does.

    python scripts/metric_order.py [--shards FILE ...] [--images 116] [--size 64] [--out TABLE.md]

Each degradation comes in strengths that everybody would put in one order. A metric orders it if its
values rise with each of them (fall, of PSNR, SSIM and recall). Without shards the embedded
photographs are cut into squares. What is measured are distances, not times.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))

from vistok.metrics.build import build_metrics

_LITE0 = {"_target_": "lite0"}

METRICS = {
    "psnr": {"_target_": "psnr"},
    "ssim": {"_target_": "ssim"},
    "ms_ssim": {"_target_": "ms_ssim", "scales": 3},
    "hed_vgg": {"_target_": "perceptual", "network": {"_target_": "hed_vgg"}},
    "lite0": {"_target_": "perceptual", "network": _LITE0},
    "fd_lite0": {"_target_": "frechet", "network": _LITE0},
    "kid_lite0": {"_target_": "kid", "network": _LITE0},
    "pr_lite0": {"_target_": "precision_recall", "network": _LITE0},
}

#: Means over images that cost much: the first 29 images are enough to see an order.
FEW = ("hed_vgg",)


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Return images as JPEG leaves them."""
    return torch.stack([_through(image, "JPEG", quality=quality) for image in images])


def _through(image: Tensor, form: str, **options: int) -> Tensor:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, form, **options)
    return _decoded(file)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Return images under a Gaussian."""
    places = torch.arange(-int(3 * sigma) - 1, int(3 * sigma) + 2)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    half = kernel.shape[-1] // 2
    x = F.pad(images.float(), (half, half, half, half), mode="reflect")
    x = F.conv2d(F.conv2d(x, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    return x.round().clamp(0, 255).byte()


def smaller(images: Tensor, factor: int) -> Tensor:
    """Return images shrunk by averaging, and enlarged again."""
    x = F.interpolate(F.avg_pool2d(images.float(), factor), size=images.shape[2:], mode="bicubic")
    return x.round().clamp(0, 255).byte()


def posterized(images: Tensor, levels: int) -> Tensor:
    """Return images of a few levels in each channel."""
    step = 255 / (levels - 1)
    return ((images.float() / step).round() * step).round().byte()


def others(images: Tensor, share: int) -> Tensor:
    """Return images of which `share` percent are others of the set, spread evenly over it."""
    exchanged = torch.arange(len(images)) * share % 100 < share
    return torch.where(exchanged.view(-1, 1, 1, 1), images.roll(1, 0), images)


DEGRADATIONS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {
    "JPEG quality": (jpeg, (50, 20, 10, 5)),  # type: ignore[dict-item]
    "blur, sigma in px": (blur, (0.7, 1.5, 3.0)),
    "downscaling by": (smaller, (2, 4, 8)),  # type: ignore[dict-item]
    "posterization, levels": (posterized, (16, 8, 4, 2)),  # type: ignore[dict-item]
    "other images, %": (others, (25, 50, 100)),  # type: ignore[dict-item]
}


def _decoded(file: object) -> Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(file) as picture:  # type: ignore[arg-type]
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def photographs(shards: list[str], count: int, size: int) -> Tensor:
    """Return `(count, 3, size, size)` uint8: center crops of shards, or cut from the embedded."""
    found = []
    for image in _read(shards) if shards else _embedded():
        if shards:
            scale = size / min(image.shape[1:])
            sides = [max(size, round(side * scale)) for side in image.shape[1:]]
            x = F.interpolate(image[None].float(), size=sides, mode="bicubic", antialias=True)[0]
            top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
            found.append(x[:, top : top + size, left : left + size].round().clamp(0, 255).byte())
        else:
            cells = image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4)
            found += list(cells.flatten(0, 1))
        if len(found) >= count:
            break
    return torch.stack(found[:count])


def _read(shards: list[str]) -> Iterator[Tensor]:
    for shard in shards:
        with tarfile.open(shard) as file:
            for member in file:
                if member.name.endswith(".jpg") and (content := file.extractfile(member)):
                    yield _decoded(content)


def _embedded() -> Iterator[Tensor]:
    from skimage import data

    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        yield torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)


def measure(originals: Tensor) -> dict[tuple[str, float, str], float]:
    """Return the value of each metric for each degradation and strength."""
    keys = [
        (title, strength, name)
        for title, (_, strengths) in DEGRADATIONS.items()
        for strength in strengths
        for name in METRICS
    ]
    # One table, so that each network looks at the originals once.
    metrics = build_metrics({"@".join(map(str, key)): METRICS[key[2]] for key in keys})
    sets = dict(zip(keys, metrics.values(), strict=True))
    degraded = {key[:2]: DEGRADATIONS[key[0]][0](originals, key[1]).split(29) for key in keys}
    for number, chunk in enumerate(originals.split(29)):
        for key, metric in sets.items():
            if key[2] in FEW and number:
                continue
            metric.update(chunk, degraded[key[:2]][number])
        print(f"batch {number + 1}", file=sys.stderr, flush=True)
    found = {}
    for key, metric in sets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = metric.compute()
        if isinstance(value, dict):
            value = value["recall" if "recall" in value else "distance"]
        found[key] = value.item()
    return found


def rises(values: list[float], higher_is_better: bool) -> bool:
    """Return whether a metric gets worse from each strength to the next."""
    ordered = values[::-1] if higher_is_better else values
    return all(a < b for a, b in itertools.pairwise(ordered))


def main(words: list[str] | None = None) -> int:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", nargs="*", default=[])
    parser.add_argument("--images", type=int, default=116)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    originals = photographs(options.shards, options.images, options.size)
    better = {name: bool(m.higher_is_better) for name, m in build_metrics(METRICS).items()}
    lines = [
        f"{len(originals)} photographs of {options.size} x {options.size} px; "
        f"{', '.join(FEW)} of the first 29.",
        "",
    ]
    lines += ["| degradation | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    found = measure(originals)
    for title, (_, strengths) in DEGRADATIONS.items():
        cells = []
        for name in METRICS:
            values = [found[title, strength, name] for strength in strengths]
            shown = " ".join(f"{value:.3g}" for value in values)
            cells.append(shown if rises(values, better[name]) else f"**no**: {shown}")
        said = ", ".join(f"{strength:g}" for strength in strengths)
        lines.append(f"| {title} {said} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
