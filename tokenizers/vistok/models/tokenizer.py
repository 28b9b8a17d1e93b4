"""A tokenizer: an encoder, a quantizer and a decoder, and the calls that users make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.geometry import as_pair
from vistok.core.outputs import Prediction, QuantizerOutput, TokenizerOutput
from vistok.core.registry import register
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.terminal import counted
from vistok.core.values import Count, ImageSize
from vistok.models.arguments import as_lengths, as_plain, as_tensor, in_words, is_whole
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.models.packing import Alphabet, pack, unpack
from vistok.models.preprocessing import Preprocessing, to_unit_range
from vistok.nn.data_init import Say, chunks, quiet
from vistok.quantizers.base import Quantizer


@register("tokenizer")
class Tokenizer(Preprocessing, nn.Module):
    """Images to integers and back.

    Subclasses add what their paper adds; the parts are given, never built inside.

    Args:
        encoder: images to latents.
        quantizer: latents to indices and vectors.
        decoder: vectors to images.
        image_size: (H, W) of the images in pixels, or the side of square ones.
        channels: C of the images.
    """

    #: How a sequence model should read the tokens: "raster", "nested", "holistic" (tokens of the
    #: whole image, then a raster) or "unordered".
    token_order = "raster"

    #: Parts that sharded training keeps whole on every rank: codes are moved row by row.
    unsharded = ("quantizer",)
    #: Methods, in addition to `forward`, that sharded weights are gathered for.
    entries = ("tokenize", "detokenize")

    def __init__(
        self,
        encoder: Encoder,
        quantizer: Quantizer,
        decoder: Decoder,
        image_size: ImageSize,
        channels: Count = 3,
    ) -> None:
        super().__init__()
        if not encoder.dim == quantizer.dim == decoder.dim:
            raise ArgumentError(
                f"latent_dim: encoder {encoder.dim}, quantizer {quantizer.dim} and "
                f"decoder {decoder.dim} differ; all three must be equal"
            )
        if (taken := getattr(decoder, "num_tokens", encoder.num_tokens)) < encoder.num_tokens:
            raise ArgumentError(
                f"decoder.num_latent_tokens: the decoder takes {taken} tokens, but the "
                f"encoder makes {encoder.num_tokens}; must be {encoder.num_tokens}"
            )
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.image_size = as_pair(image_size)
        self.channels = channels
        self.frozen: tuple[str, ...] = ()

    # ------------------------------------------------------------------ training

    def forward(
        self, images: Tensor, taps: Iterable[str] = (), **conditions: Tensor
    ) -> TokenizerOutput:
        """Compute a training step's predictions.

        Args:
            images: `(B, C, H, W)` in [-1, 1].
            taps: names of features to collect on the way; `tap_shapes` has them all.
            conditions: what the decoder is given in addition to tokens; see `conditions_of`.
        """
        collected = Taps(taps)
        signal = self.to_signal(images)
        latents = self.encode(signal, collected.inside("encoder"))
        collected.offer("latents", latents)
        # Dropped after quantizing, as in the published methods: the quantizer sees all tokens.
        output = self.quantize(latents)
        collected.offer("codes", output.quantized)
        inside = collected.inside("decoder")
        predictions, shown = self.predict(latents, output.quantized, signal, inside, conditions)
        return TokenizerOutput(predictions, output, shown, collected.features)

    def predict(
        self,
        latents: Tensor,
        quantized: Tensor,
        signal: Tensor,
        taps: Taps,
        conditions: Mapping[str, Tensor],
    ) -> tuple[dict[str, Prediction], Tensor | None]:
        """Return the predictions of `heads`, and the mask `(B, N)` of the tokens kept for them."""
        kept, mask, shown = self.keep(latents, quantized)
        return self.decoder(kept, signal, mask, taps=taps, **conditions), shown

    @property
    def heads(self) -> dict[str, str]:
        """Return the kinds of the predictions of a training step by name: those of the decoder."""
        return self.decoder.heads

    def tap_shapes(self) -> dict[str, Tap]:
        """Return the shapes of all features that `taps` may name.

        "latents" and "codes" are what the quantizer gets and returns.
        """
        shapes = dict.fromkeys(("latents", "codes"), Tap(self.encoder.dim, self.encoder.grid))
        for part, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            shapes |= {f"{part}.{name}": tap for name, tap in module.tap_shapes().items()}
        return shapes

    def conditions_of(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what a batch has for the decoder in addition to tokens, such as a text."""
        return {name: batch[name] for name in self.decoder.conditions if name in batch}

    def keep(
        self, latents: Tensor, quantized: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Choose the tokens that the decoder gets in a training step.

        Args:
            latents: `(B, N, D)`.
            quantized: `(B, N, D)`.

        Returns:
            The tokens for the decoder `(B, n, D)`, the mask for it `(B, n)` or None, and the mask
            `(B, N)` of those kept, or None for all.
        """
        mask = self.sample_mask(latents)
        return quantized, mask, mask

    def sample_mask(self, latents: Tensor) -> Tensor | None:
        """Return which tokens `(B, N)` the decoder gets in this step; None for all of them."""
        return None

    def freeze(self, *parts: str) -> None:
        """Keep parts as they are: no gradient, no statistics, in eval mode from now on.

        Args:
            parts: dotted names of submodules, such as "encoder" or "decoder.pixel_decoder". A
                quantizer whose encoder learns is in training mode, so that gradients get there.
        """
        for name in parts:
            self.get_submodule(name).requires_grad_(False)
        self.frozen += parts
        self.train(self.training)

    def train(self, mode: bool = True) -> Tokenizer:
        """Set the mode of all parts that are not frozen."""
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        if "quantizer" in self.frozen and any(p.requires_grad for p in self.encoder.parameters()):
            self.quantizer.train(mode)
        return self

    calibrates = False  # whether `calibrate` measures something, with `init=random` too

    def calibrate(self, images: Tensor, say: Say = quiet) -> None:
        """Measure on training images what no loss teaches; arguments as of `initialize`."""

    @torch.no_grad()
    def initialize(self, images: Tensor, say: Say = quiet, keep: Sequence[str] = ()) -> None:
        """Set what learns faster from a good start, before the first step.

        After `calibrate` encoder, quantizer and decoder, in chunks that bound the memory.

        Args:
            images: training images `(M, C, H, W)`, uint8 or in [-1, 1], the same on every rank.
            say: told which part comes next.
            keep: which of encoder, quantizer and decoder stay as they are.
        """
        was_training = self.training
        self.eval()
        self.calibrate(images, say)
        few = self._signals(images[: self.init_images])
        if "encoder" not in keep:
            say(f"encoder, from {counted(len(few), 'image')}")
            self.encoder.initialize(few)
        if "quantizer" not in keep:
            say(f"codebook, from {counted(len(images), 'image')}")
        latents = torch.cat([self.encode(self._signals(part)).float() for part in chunks(images)])
        if "quantizer" not in keep:
            self.quantizer.initialize_from(latents.flatten(0, 1))
        if "decoder" not in keep:
            say(f"decoder, from {counted(len(few), 'image')}")
            pairs = chunks(few, latents[: len(few)])
            self.decoder.initialize(torch.cat([self.quantize(x).quantized for _, x in pairs]), few)
        self.train(was_training)

    @property
    def init_images(self) -> int:
        """Number of images that encoder and decoder start from: 65536 squares of 8 pixels."""
        height, width = self.image_size
        return max(1, 2**22 // (height * width))

    def _signals(self, images: Tensor) -> Tensor:
        """Return the signals of images, uint8 or in [-1, 1], on this tokenizer's device."""
        ready = (
            self.to_model_range(part) if part.dtype == torch.uint8 else part.to(self.device)
            for part in chunks(images)
        )
        return torch.cat([self.to_signal(part) for part in ready])

    # ------------------------------------------------------------------ parts

    def to_signal(self, images: Tensor) -> Tensor:
        """Return what is tokenized, of images `(B, C, H, W)` in [-1, 1]: the images themselves.

        A tokenizer of an autoencoder's latents maps them there, and back in `to_images`. Its
        encoder and decoder know nothing of it.
        """
        return images

    def to_images(self, signal: Tensor) -> Tensor:
        """Inverse of `to_signal`."""
        return signal

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents `(B, N, D)`; in training the usage of a frozen quantizer counts too."""
        output = self.quantizer(latents, grid=self.encoder.grid)
        if self.training and not self.quantizer.training:
            self.quantizer.usage.update(output.indices)
        return output

    def encode(self, signal: Tensor, taps: Taps = NO_TAPS) -> Tensor:
        """Encode what `to_signal` returns, `(B, C, H, W)`, to latents `(B, N, D)`.

        In training there may be more of them, behind those of the code.
        """
        return self.encoder(signal, taps=taps)

    def decode(self, quantized: Tensor, mask: Tensor | None = None, **sampling: Any) -> Tensor:
        """Quantized latents `(B, N, D)` to what `to_images` takes, `(B, C, H, W)`, unclamped.

        Args:
            quantized: vectors of the tokens.
            mask: `(B, N)` bool; tokens marked False are as if they were not there.
            sampling: as in `detokenize`.
        """
        return self.decoder.reconstruct(quantized, mask, **self._sampling(sampling))

    # ------------------------------------------------------------------ what users call

    @torch.no_grad()
    def tokenize(self, images: Any, num_tokens: int | None = None) -> Tensor:
        """Turn images into integers.

        Args:
            images: `(B, C, H, W)`, uint8 or float in [0, 1]; a tensor or an array.
            num_tokens: budget of a flexible tokenizer, 1 to N; None for all of them.

        Returns:
            `(B, N, Q)` int64 ids, or `(B, num_tokens, Q)`; Q is kept when it is 1.
        """
        signal = self.to_signal(self.to_model_range(images))
        latents = self.encode(signal.to(_precision(self.encoder)))[:, : self.encoder.num_tokens]
        return self._budget(self.quantizer.encode(latents, self.encoder.grid), num_tokens)[0]

    @torch.no_grad()
    def detokenize(
        self, ids: Any, num_tokens: int | Tensor | None = None, **sampling: Any
    ) -> Tensor:
        """Turn ids back into images.

        Args:
            ids: `(B, N, Q)` integers, in a tensor, an array or lists; for a flexible tokenizer
                also fewer than N tokens.
            num_tokens: how many of them to use, by flexible tokenizers: one number, or `(B,)` of
                them. Ids behind an image's own number are not looked at.
            sampling: arguments of a decoder that samples (`steps`, `guidance`, `seed` of a flow)
                or that reads more than tokens (`text`).

        Returns:
            `(B, C, H, W)` float in [0, 1].
        """
        ids, mask = self._budget(self._as_ids(ids).to(self.device), num_tokens)
        self._check_range(ids)
        quantized = self.quantizer.decode(ids, self.encoder.grid).to(_precision(self.decoder))
        signal = self.decode(quantized, mask, **sampling)
        return to_unit_range(self.to_images(signal))

    def tokenize_to_target(
        self,
        images: Any,
        psnr: float | Sequence[float] | Tensor | None = None,
        max_bytes: float | None = None,
        budgets: int | Iterable[int] | None = None,
        **sampling: Any,
    ) -> tuple[Tensor, Tensor]:
        """Find as few tokens as a target needs; see `FlexibleTokenizer`."""
        self._refuse_length("tokenize_to_target")

    def detokenize_progressive(
        self, ids: Any, budgets: int | Iterable[int] | None = None, **sampling: Any
    ) -> Tensor:
        """One picture per prefix; see `FlexibleTokenizer`."""
        self._refuse_length("detokenize_progressive")

    def to_bytes(self, ids: Any, num_tokens: int | Tensor | None = None) -> list[bytes]:
        """Pack the ids of each image into as few bytes as all codes of its length need.

        Those of k tokens are the digits of one number and take `k * bits_per_token` bits, filled
        up to a whole byte. That is what `max_bytes` and evaluation count: there is no header, no
        entropy coding, and the number of tokens is not among them.

        Args:
            ids: `(B, n, Q)`, as `detokenize` takes them.
            num_tokens: how many of them to pack, as in `detokenize`.

        Returns:
            The bytes of each image.
        """
        ids, mask = self._budget(self._as_ids(ids), num_tokens)
        self._check_range(ids)
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
        return [
            pack(row[:length].flatten().tolist(), self._alphabet(length))
            for row, length in zip(ids.cpu(), lengths, strict=True)
        ]

    def from_bytes(self, packed: Iterable[bytes], num_tokens: int | Tensor | None = None) -> Tensor:
        """Inverse of `to_bytes`.

        Args:
            packed: the bytes of B images.
            num_tokens: tokens of all, or `(B,)` of each; None for all N.

        Returns:
            `(B, n, Q)` int64 ids, n the largest number of tokens; zeros behind the shorter codes.

        Raises:
            ConfigError: if the bytes of an image are no code of its length.
        """
        if isinstance(packed, (bytes, str)) or not isinstance(packed, Iterable):
            raise ConfigError(
                f"packed: expected the bytes of each image, such as a list of them, "
                f"found {in_words(packed)}"
            )
        packed, slots = list(packed), self.quantizer.num_indices
        ids = torch.zeros(len(packed), self.num_tokens, slots, dtype=torch.long)
        ids, mask = self._budget(ids, num_tokens)
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
        for number, (data, length) in enumerate(zip(packed, lengths, strict=True)):
            try:
                found = unpack(memoryview(data), self._alphabet(length))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"packed: image {number} is not a code of {length} tokens: {error}"
                ) from error
            ids[number, :length] = torch.tensor(found).view(length, slots)
        return ids.to(self.device)

    def codebooks(self) -> list[Tensor]:
        """The Q tables `(K_q, d_q)`, float32, in the space that a downstream model looks up."""
        return [table.detach().float() for table in self.quantizer.codebooks()]

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens per image (of ids, where scales make them more than latents)."""
        return self.quantizer.num_index_tokens(self.encoder.num_tokens, self.encoder.grid)

    @property
    def bits_per_image(self) -> float:
        """Size of an image's code in bits, without entropy coding."""
        return self.num_tokens * self.quantizer.bits_per_token

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return next(self.parameters()).device

    def _budget(self, ids: Tensor, num_tokens: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids of the budget and a mask `(B, n)` if budgets differ; here there is only one."""
        if num_tokens is not None and (as_lengths(num_tokens, ids) != self.num_tokens).any():
            self._refuse_length("num_tokens")
        if ids.shape[1] != self.num_tokens:
            self._refuse_length(f"ids of {ids.shape[1]} tokens")
        return ids, None

    def _alphabet(self, length: int) -> Alphabet:
        """The values that the ids of a code of `length` tokens can have, in their order."""
        return [(0, size) for size in self.quantizer.codebook_sizes] * length

    def _refuse_length(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{what}: {type(self).__name__} has a fixed length of {self.num_tokens} tokens; other "
            "budgets need a flexible tokenizer (docs/guide/flexible_length.md)"
        )

    def _sampling(self, sampling: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the decoder: numbers as Python's, values for each image as a tensor."""
        taken = (*self.decoder.sampling, *self.decoder.conditions)
        for name in sampling:
            if name not in taken:
                known = ", ".join(taken) or "none"
                raise ConfigError(
                    f"{name}: {type(self.decoder).__name__} takes no such argument; it has: {known}"
                )
        plain = {name: as_plain(value) for name, value in sampling.items()}
        self.decoder.check_sampling(**plain)
        return plain

    def _as_ids(self, ids: Any) -> Tensor:
        """Return what a user gave as ids: `(B, n, Q)` int64."""
        slots, found = self.quantizer.num_indices, as_tensor(ids)
        if found is None or found.ndim != 3 or found.shape[-1] != slots:
            shape = in_words(ids) if found is None else tuple(found.shape)
            raise ConfigError(f"ids: expected (B, N, {slots}), found {shape}")
        if not is_whole(found):
            raise ConfigError(f"ids: expected integers, found {found.dtype}")
        return found.long()

    def _check_range(self, ids: Tensor) -> None:
        if ids.numel():
            low, high = (found.tolist() for found in ids.flatten(0, 1).aminmax(dim=0))
            for slot, size in enumerate(self.quantizer.codebook_sizes):
                if low[slot] < 0 or high[slot] >= size:
                    bad = low[slot] if low[slot] < 0 else high[slot]
                    raise ConfigError(f"ids: slot {slot} holds {bad}, valid are 0 to {size - 1}")


def _precision(part: nn.Module) -> torch.dtype:
    """Return what a part computes in; after `tok.bfloat16()` not what the quantizer does."""
    return next(part.parameters()).dtype
