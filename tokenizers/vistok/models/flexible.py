"""Flexible length: tokenizers of which every prefix of the ids is a code of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vistok.decoders.base import Decoder
from vistok.encoders.base import Encoder
from vistok.errors import ConfigError
from vistok.models.length import LengthPolicy, LevelPolicy
from vistok.models.tokenizer import Tokenizer
from vistok.quantizers.base import Quantizer
from vistok.types import TokenizerOutput


class FlexibleTokenizer(Tokenizer):
    """A tokenizer whose decoder learns to work from the first k tokens, for every k of 1 to N.

    All N tokens are encoded and quantized; then, in training, the length policy says how many
    the decoder gets. So the ids of a shorter budget are a prefix of those of a longer one.

    Args:
        encoder: images to latents.
        quantizer: latents to indices and vectors.
        decoder: vectors to images; it must take a mask.
        image_size: (H, W) in pixels, or the side of squares.
        length: how many tokens a training step keeps.
        channels: C of the images.
    """

    token_order = "nested"

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        decoder: Decoder,
        image_size: int | Sequence[int],
        length: LengthPolicy | LevelPolicy,
        channels: int = 3,
    ) -> None:
        super().__init__(encoder, quantizer, decoder, image_size, channels)
        self.length = length

    # ------------------------------------------------------------------ training

    def sample_mask(self, latents: Tensor) -> Tensor | None:
        """`(B, N)`, True for the first k tokens of each image; None in eval mode: all of them."""
        if not self.training:
            return None
        batch, length, _ = latents.shape
        return prefix_mask(self.length(batch, length, latents.device), length)

    def forward(self, images: Tensor, **conditions: Tensor) -> TokenizerOutput:
        """Training forward; where the whole batch keeps the same k, the tail is cut off.

        `torch.compile` wants shapes that stay, so there a mask hides the tail instead: the same
        numbers, at the price of the full length.
        """
        if not self.training or self.length.per == "sample" or torch.compiler.is_compiling():
            return super().forward(images, **conditions)
        signal = self.to_signal(images)
        latents = self.encode(signal)
        output = self.quantize(latents)
        batch, length, _ = latents.shape
        kept = self.length(batch, length)  # on the host: a shape depends on it
        cut = output.quantized[:, : int(kept[0])] if batch else output.quantized
        prediction, target = self.decoder(cut, signal, **conditions)
        mask = prefix_mask(kept, length).to(latents.device)
        return TokenizerOutput(prediction, target, output, mask)

    # ------------------------------------------------------------------ what users call

    @torch.no_grad()
    def tokenize_to_target(
        self,
        images: Tensor,
        psnr: float | None = None,
        max_bytes: float | None = None,
        budgets: Iterable[int] | None = None,
        **sampling: Any,
    ) -> tuple[Tensor, Tensor]:
        """Turn images into as few tokens as a target needs, image by image.

        With `psnr`, an image gets the smallest budget whose reconstruction, rounded to 8 bits,
        reaches it. Budgets are tried in rising order, because the quality of a trained tokenizer
        rises with them on average but not for every image; an image that none of them satisfies
        gets the largest. With `max_bytes` alone, every image gets as many tokens as fit. With
        both, `max_bytes` bounds the budgets.

        Args:
            images: `(B, C, H, W)`, uint8 or float in [0, 1].
            psnr: dB to reach.
            max_bytes: of the ids, packed without a header or entropy coding.
            budgets: numbers of tokens to try, by default all of 1..N. Each costs a decoding of
                the images that have not reached the target yet.
            sampling: as in `detokenize`.

        Returns:
            ids `(B, n, Q)` int64, n the largest budget given out, and num_tokens `(B,)` int64.
            Ids behind an image's own number belong to its longer codes.
        """
        if psnr is None and max_bytes is None:
            raise ConfigError("tokenize_to_target: needs psnr= (dB) or max_bytes=")
        ids = self.tokenize(images)
        most = self.num_tokens if max_bytes is None else self.tokens_within(max_bytes)
        tried = sorted(set(range(1, most + 1) if budgets is None else budgets))
        if tried and not 1 <= tried[0] <= tried[-1] <= self.num_tokens:
            raise ConfigError(f"budgets={tried}: must lie in 1 to {self.num_tokens}")
        tried = [budget for budget in tried if budget <= most]
        num_tokens = torch.full((len(ids),), most, device=ids.device)
        if psnr is not None:
            originals = (self.to_model_range(images) + 1) / 2
            open_ = torch.arange(len(ids), device=ids.device)
            for budget in tried:
                if not len(open_):
                    break
                own = {  # a seed or a text of its own for each image
                    name: value[open_] if isinstance(value, Tensor) and value.ndim else value
                    for name, value in sampling.items()
                }
                pictures = self.detokenize(ids[open_], budget, **own)
                reached = rounded_psnr(pictures, originals[open_]) >= psnr
                num_tokens[open_[reached]] = budget
                open_ = open_[~reached]
            if tried:
                num_tokens[open_] = tried[-1]
        longest = int(num_tokens.max()) if len(ids) else most
        return ids[:, :longest], num_tokens

    @torch.no_grad()
    def detokenize_progressive(
        self, ids: Tensor, budgets: Iterable[int] | None = None, **sampling: Any
    ) -> Tensor:
        """One picture per prefix.

        Args:
            ids: `(B, n, Q)`.
            budgets: lengths of the prefixes, by default all of 1..n.
            sampling: as in `detokenize`.

        Returns:
            `(B, len(budgets), C, H, W)` float in [0, 1].
        """
        lengths = range(1, ids.shape[1] + 1) if budgets is None else list(budgets)
        return torch.stack([self.detokenize(ids, k, **sampling) for k in lengths], dim=1)

    def tokens_within(self, max_bytes: float) -> int:
        """The most tokens whose ids fit into `max_bytes`, at most N."""
        fitting = int(8 * max_bytes / self.quantizer.bits_per_token + 1e-9)
        if fitting < 1:
            raise ConfigError(
                f"max_bytes={max_bytes:g}: one token has {self.quantizer.bits_per_token:.4g} bits"
            )
        return min(fitting, self.num_tokens)

    # ------------------------------------------------------------------ lengths

    def _budget(self, ids: Tensor, num_tokens: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids cut to the longest budget, and a mask if budgets differ."""
        available = ids.shape[1]
        if num_tokens is None and available == self.num_tokens:
            return ids, None
        if self.quantizer.num_index_tokens(available) != available:
            raise ConfigError(
                f"num_tokens: ids of {type(self.quantizer).__name__} stand for scales, not for "
                f"tokens; pass all {self.num_tokens} of them and no num_tokens"
            )
        if num_tokens is None:
            num_tokens = available
        lengths = torch.as_tensor(num_tokens, device=ids.device)
        if lengths.is_floating_point() or lengths.shape not in ((), (len(ids),)):
            raise ConfigError(
                f"num_tokens: expected an integer or ({len(ids)},) of them, found "
                f"{tuple(lengths.shape)} {lengths.dtype}"
            )
        low, high = (int(lengths.min()), int(lengths.max())) if lengths.numel() else (1, 1)
        if low < 1 or high > min(available, self.num_tokens):
            raise ConfigError(
                f"num_tokens={low if low < 1 else high}: must be 1 to "
                f"{min(available, self.num_tokens)} for ids of {available} tokens"
            )
        ids = ids[:, :high]
        if low == high:
            return ids, None
        mask = prefix_mask(lengths, high)
        # What lies behind an image's own length may be padding of any kind.
        return torch.where(mask[..., None], ids, 0), mask


def prefix_mask(lengths: Tensor, total: int) -> Tensor:
    """`(B, total)` bool, True for the first `lengths` `(B,)` positions."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]


def rounded_psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """PSNR `(B,)` in dB of pictures in [0, 1], rounded to 8 bits first, as in evaluation."""
    rounded = (pictures.double() * 255).round() / 255
    error = (rounded - originals.double()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-10))
