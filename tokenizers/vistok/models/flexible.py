"""Flexible length: tokenizers of which every prefix of the ids is a code of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from vistok.core.errors import ConfigError
from vistok.core.outputs import Prediction
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import Count, ImageSize
from vistok.models.arguments import as_budgets, as_lengths, as_numbers, as_tensor, in_words
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.models.length import LengthPolicy, LevelPolicy
from vistok.models.tokenizer import Tokenizer
from vistok.quantizers.base import Quantizer

#: Begins the names of the predictions from all tokens.
WHOLE = "whole_"


@register("flexible_tokenizer")
class FlexibleTokenizer(Tokenizer):
    """A tokenizer whose decoder learns to work from the first k tokens, for every k of 1 to N.

    All N tokens are encoded and quantized; then, in training, the length policy says how many
    the decoder gets. So the ids of a shorter budget are a prefix of those of a longer one.

    With `length.whole` the decoder works twice in a step, from the one encoding of it: from the
    tokens that were kept, and from the whole code. The second predictions have the names of the
    first with "whole_" before them ("whole_image"). Features are tapped from the first alone.

    Args:
        encoder: images to latents.
        quantizer: latents to indices and vectors. One whose ids stand for scales of the whole code
            leaves no prefixes: then all N tokens are kept, and a warning says so.
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
        image_size: ImageSize,
        length: LengthPolicy | LevelPolicy,
        channels: Count = 3,
    ) -> None:
        super().__init__(encoder, quantizer, decoder, image_size, channels)
        length.budgets(encoder.num_tokens)  # refuses a policy for longer codes
        if not self._has_prefixes:
            warnings.warn(
                f"quantizer: the ids of {type(quantizer).__name__} stand for scales of the whole "
                f"code, so a prefix is not a code; {type(self).__name__} keeps its full length",
                stacklevel=2,
            )
            length = LengthPolicy("full", whole=length.whole)
        self.length = length

    # ------------------------------------------------------------------ training

    def sample_mask(self, latents: Tensor) -> Tensor | None:
        """`(B, N)`, True for the first k tokens of each image; None in eval mode: all of them."""
        if not self.training:
            return None
        batch, length, _ = latents.shape
        return prefix_mask(self.length(batch, length, latents.device), length)

    def keep(
        self, latents: Tensor, quantized: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Choose the first k tokens; where the whole batch keeps the same k, cut the tail off.

        `torch.compile` wants shapes that stay, so there a mask hides the tail instead: the same
        numbers, at the price of the full length.
        """
        if not self.training or self.length.per == "sample" or torch.compiler.is_compiling():
            return super().keep(latents, quantized)
        batch, length, _ = latents.shape
        kept = self.length(batch, length)  # on the host: a shape depends on it
        cut = quantized[:, : int(kept[0])] if batch else quantized
        return cut, None, prefix_mask(kept, length).to(latents.device)

    def predict(
        self,
        latents: Tensor,
        quantized: Tensor,
        signal: Tensor,
        taps: Taps,
        conditions: Mapping[str, Tensor],
    ) -> tuple[dict[str, Prediction], Tensor | None]:
        """Return the predictions from the tokens kept and, with `length.whole`, from all of them.

        Where the batch keeps exactly the whole code, the second are the first.
        """
        kept, mask, shown = self.keep(latents, quantized)
        drawn = whole = self.decoder(kept, signal, mask, taps=taps, **conditions)
        if not self.length.whole:
            return drawn, shown
        total = self.encoder.num_tokens  # there may be padding behind
        if mask is not None or kept.shape[1] != total:
            whole = self.decoder(quantized[:, :total], signal, None, taps=NO_TAPS, **conditions)
        return drawn | {f"{WHOLE}{name}": found for name, found in whole.items()}, shown

    @property
    def heads(self) -> dict[str, str]:
        """Return the decoder's and, with `length.whole`, the same of the whole code."""
        drawn = self.decoder.heads
        whole = {f"{WHOLE}{name}": kind for name, kind in drawn.items()}
        return drawn | whole if self.length.whole else drawn

    # ------------------------------------------------------------------ what users call

    @torch.no_grad()
    def tokenize_to_target(
        self,
        images: Any,
        psnr: float | Sequence[float] | Tensor | None = None,
        max_bytes: float | None = None,
        budgets: int | Iterable[int] | None = None,
        **sampling: Any,
    ) -> tuple[Tensor, Tensor]:
        """Turn images into as few tokens as a target needs, image by image.

        With `psnr`, an image gets the smallest budget whose reconstruction, rounded to 8 bits,
        reaches it. Budgets are tried in rising order, because the quality of a trained tokenizer
        rises with them on average but not for every image; an image that none of them satisfies
        gets the largest, and a warning says how many there are. With `max_bytes` alone, every
        image gets the largest budget that fits. With both, `max_bytes` bounds the budgets.

        Args:
            images: `(B, C, H, W)`, uint8 or float in [0, 1].
            psnr: dB to reach, one number or one for each image.
            max_bytes: of an image's ids, packed as in `to_bytes`.
            budgets: numbers of tokens to choose from; by default all of 1..N, or ResTok's levels
                (`tok.length.budgets(N)`). With `psnr` each costs a decoding of the images that
                have not reached the target yet.
            sampling: as in `detokenize`; B values are one for each image.

        Returns:
            ids `(B, n, Q)` int64, n the largest budget given out, and num_tokens `(B,)` int64.
            Ids behind an image's own number belong to its longer codes.

        Raises:
            ConfigError: if there is no target, or no budget that fits.
        """
        if psnr is None and max_bytes is None:
            raise ConfigError("tokenize_to_target: needs psnr= (dB) or max_bytes=")
        tried, sampling = self._budgets_within(max_bytes, budgets), self._sampling(sampling)
        ids = self.tokenize(images)
        num_tokens = torch.full((len(ids),), tried[-1], device=ids.device)
        if psnr is None:
            return ids[:, : tried[-1]], num_tokens
        targets = as_numbers(psnr)
        if targets is None or targets.shape not in ((), (len(ids),)):
            raise ConfigError(
                f"psnr: expected dB, one number or ({len(ids)},) of them, found {in_words(psnr)}"
            )
        targets = targets.to(ids.device).expand(len(ids))
        originals = self._exact(images)
        best = torch.full_like(targets, -torch.inf)
        open_ = torch.arange(len(ids), device=ids.device)
        for budget in tried:
            if not len(open_):
                break
            own = {  # a seed or a text of its own for each image
                name: value[open_.to(value.device)]
                if isinstance(value, Tensor) and value.ndim and len(value) == len(ids)
                else value
                for name, value in sampling.items()
            }
            pictures = self.detokenize(ids[open_], budget, **own)
            best[open_] = best[open_].maximum(rounded_psnr(pictures, originals[open_]))
            reached = best[open_] >= targets[open_]
            num_tokens[open_[reached]] = budget
            open_ = open_[~reached]
        if len(open_):
            low, high = (value.item() for value in best[open_].aminmax())
            warnings.warn(
                f"tokenize_to_target: {len(open_)} of {len(ids)} images reach their psnr with none "
                f"of the budgets, at best {low:.2f} to {high:.2f} dB; they get {tried[-1]} tokens",
                stacklevel=3,  # behind no_grad's
            )
        longest = int(num_tokens.max()) if len(ids) else tried[-1]
        return ids[:, :longest], num_tokens

    @torch.no_grad()
    def detokenize_progressive(
        self, ids: Any, budgets: int | Iterable[int] | None = None, **sampling: Any
    ) -> Tensor:
        """One picture per prefix.

        Args:
            ids: `(B, n, Q)`, as `detokenize` takes them.
            budgets: lengths of the prefixes, by default all of 1..n.
            sampling: as in `detokenize`.

        Returns:
            `(B, len(budgets), C, H, W)` float in [0, 1].
        """
        ids = self._as_ids(ids)
        most = self._available(ids, budgets)
        lengths = range(1, most + 1) if budgets is None else as_budgets(budgets, most)
        return torch.stack([self.detokenize(ids, k, **sampling) for k in lengths], dim=1)

    def tokens_within(self, max_bytes: float) -> int:
        """The most tokens whose ids, packed as in `to_bytes`, fit into `max_bytes`, at most N.

        Raises:
            ConfigError: if not even one does.
        """
        limit = as_numbers(max_bytes)
        if limit is None or limit.ndim:
            raise ConfigError(f"max_bytes: expected a number, found {in_words(max_bytes)}")
        bits = self.quantizer.bits_per_token
        fitting = min(8 * limit.floor().item() / bits + 1e-9, self.num_tokens)  # whole bytes
        if fitting < 1:
            raise ConfigError(f"max_bytes={limit.item():g}: one token has {bits:.4g} bits")
        return int(fitting)

    # ------------------------------------------------------------------ lengths

    def _exact(self, images: Any) -> Tensor:
        """Checked images in [0, 1], float64; by way of [-1, 1] they would lose digits."""
        given = torch.as_tensor(as_tensor(images), device=self.device)
        return given.double() / (255 if given.dtype == torch.uint8 else 1)

    def _budgets_within(self, max_bytes: float | None, budgets: Any) -> list[int]:
        """Those given, or the length policy's, that fit into `max_bytes`; rising, never none."""
        if not self._has_prefixes:
            self._refuse_scales("tokenize_to_target")
        if budgets is None:
            known = self.length.budgets(self.num_tokens)
        else:
            known = sorted(set(as_budgets(budgets, self.num_tokens)))
        most = self.num_tokens if max_bytes is None else self.tokens_within(max_bytes)
        fitting = [budget for budget in known if budget <= most]
        if not fitting:
            raise ConfigError(
                f"max_bytes={max_bytes}: {most} tokens fit, but the smallest of the budgets is "
                f"{known[0]}; give more bytes, or smaller budgets="
            )
        return fitting

    def _available(self, ids: Tensor, budget: Any) -> int:
        """The longest budget of ids `(B, n, Q)`; more than N tokens are cut to a named one only."""
        count = ids.shape[1]
        if count < 1 or (count > self.num_tokens and budget is None):
            raise ConfigError(
                f"ids: expected 1 to {self.num_tokens} tokens for each image, found {count}"
            )
        return min(count, self.num_tokens)

    @property
    def _has_prefixes(self) -> bool:
        """Return whether there is an id (of any number of slots) per token."""
        return self.quantizer.per_token

    def _refuse_scales(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{what}: ids of {type(self.quantizer).__name__} stand for scales, not for "
            f"tokens; pass all {self.num_tokens} of them and no num_tokens"
        )

    def _budget(self, ids: Tensor, num_tokens: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids cut to the longest budget, and a mask if budgets differ."""
        available = ids.shape[1]
        if num_tokens is None and available == self.num_tokens:
            return ids, None
        if not self._has_prefixes:
            self._refuse_scales("num_tokens")
        most = self._available(ids, num_tokens)
        lengths = as_lengths(most if num_tokens is None else num_tokens, ids)
        low, high = (int(lengths.min()), int(lengths.max())) if lengths.numel() else (1, 1)
        if low < 1 or high > most:
            raise ConfigError(
                f"num_tokens={low if low < 1 else high}: must be 1 to {most} for ids of "
                f"{available} tokens"
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
