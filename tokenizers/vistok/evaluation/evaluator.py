"""Judge a tokenizer on a set of images: one way, in training and in eval.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.core.ranks import world_size
from vistok.evaluation.measure import flat
from vistok.metrics.image import PSNR, SSIM, ImageMetric, to_uint8
from vistok.models.tokenizer import Tokenizer
from vistok.quantizers.usage import CodeUsage


class Evaluator:
    """Accumulates what `metrics.json` holds over batches of images.

    Reconstructions are clamped to [0, 1] and rounded to 8 bits before anything is measured.

    Args:
        tokenizer: in eval mode; its device is used.
        metrics: what to measure besides the codes, by the names that results have; PSNR and SSIM
            by default.
        num_tokens: budget of a flexible tokenizer; None for all tokens.
        sampling: further arguments of `detokenize`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        metrics: Mapping[str, ImageMetric] | None = None,
        num_tokens: int | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.sampling = sampling or {}
        metrics = {"psnr": PSNR(), "ssim": SSIM()} if metrics is None else metrics
        self.metrics = {name: metric.to(tokenizer.device) for name, metric in metrics.items()}
        self.usage = CodeUsage(tokenizer.quantizer.codebook_sizes).to(tokenizer.device)
        self.num_images = 0
        self.seconds = 0.0

    @torch.no_grad()
    def update(
        self,
        images: Tensor,
        valid: Tensor | None = None,
        conditions: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Reconstruct a batch and take it in.

        Args:
            images: `(B, C, H, W)` uint8.
            valid: `(B,)` bool; images marked False (padding of the last batch) do not count.
            conditions: what the decoder is given besides tokens; see `Tokenizer.conditions_of`.

        Returns:
            The reconstructions of the valid images, `(B', C, H, W)` uint8.
        """
        given, conditions = images, conditions or {}
        first = {name: x[:1] for name, x in conditions.items()}
        if valid is not None:
            images = images[valid.to(images.device)]
            conditions = {name: x[valid.to(x.device)] for name, x in conditions.items()}
        if not len(images):
            if len(given) and world_size() > 1:
                self._reconstruct(given[:1], first)  # sharded weights are gathered by all together
            self._measure(images, images)
            return images
        start = time.perf_counter()
        images = images.to(self.tokenizer.device)
        indices, reconstructions = self._reconstruct(images, conditions)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        self.num_images += len(images)
        self.usage.update(indices)
        self._measure(images, reconstructions)
        return reconstructions

    def _measure(self, images: Tensor, reconstructions: Tensor) -> None:
        # A trainer's autocast would reach into the metrics: SSIM is a convolution.
        with torch.autocast(images.device.type, enabled=False):
            for metric in self.metrics.values():
                metric.update(images, reconstructions)

    def _reconstruct(self, images: Tensor, conditions: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        indices = self.tokenizer.tokenize(images, self.num_tokens)
        pictures = self.tokenizer.detokenize(indices, **self.sampling, **conditions)
        return indices, to_uint8(pictures)

    def compute(self) -> dict[str, float]:
        """Results over all batches and ranks; plain numbers.

        `psnr` (dB), `ssim`, `codebook_usage` (0 to 1), `perplexity`, `dead_codes`,
        `bits_per_image`, `bits_per_pixel`, `num_tokens`, `images`, `images_per_second` (of this
        rank: encoding and decoding, without reading).
        """
        height, width = self.tokenizer.image_size
        results: dict[str, float] = {}
        for name, metric in self.metrics.items():
            results.update(flat(name, metric.compute()))
        usage = {name: value.item() for name, value in self.usage.compute().items()}
        tokens = sum(int(h.sum()) for h in self.usage.histograms()) / len(self.usage.codebook_sizes)
        budget = self.num_tokens or self.tokenizer.num_tokens
        bits = budget * self.tokenizer.quantizer.bits_per_token
        return {
            **results,
            **usage,
            "bits_per_image": bits,
            "bits_per_pixel": bits / (height * width),
            "num_tokens": budget,
            "images": round(tokens / budget),
            "images_per_second": self.num_images / self.seconds if self.seconds else 0.0,
        }
