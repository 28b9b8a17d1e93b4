"""The contract of a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from vistok.core.outputs import Prediction
from vistok.core.taps import NO_TAPS, Tap, Taps


class Decoder(nn.Module, ABC):
    """Maps quantized latents `(B, N, D)` back to images.

    Attributes:
        dim: D, the width of the quantized latents.
        num_tokens: the longest code, of decoders that have a place for each token.
    """

    dim: int
    num_tokens: int

    #: Names of further arguments of `reconstruct`; only of decoders that sample.
    sampling: tuple[str, ...] = ()

    #: Names of what `forward` and `reconstruct` take besides tokens, such as "text". In a batch it
    #: is the field of that name. The decoder works without it too.
    conditions: tuple[str, ...] = ()

    @abstractmethod
    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **sampling: Any,
    ) -> Tensor:
        """Return images `(B, C, H, W)` near [-1, 1] (unclamped) from `(B, N, D)`.

        Args:
            quantized: vectors of the tokens.
            mask: `(B, N)` bool; tokens marked False are as if they were not there.
            taps: offered the features that `tap_shapes` names.
            sampling: arguments named in `sampling` or `conditions`.
        """

    def check_sampling(self, **sampling: Any) -> None:
        """Refuse values of arguments of `reconstruct` that it could not work with.

        Raises:
            ConfigError: of decoders that sample.
        """

    @property
    def heads(self) -> dict[str, str]:
        """Kinds of the predictions that `forward` returns, by name; see `Prediction`."""
        return {"image": "pixels"}

    def forward(
        self,
        quantized: Tensor,
        images: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        **conditions: Tensor,
    ) -> dict[str, Prediction]:
        """Return the predictions of a training step, one for each of `heads`.

        By default the image's pixels. A decoder that learns something else (codes of a proxy
        tokenizer, the velocity of a flow), or more than that, overrides this and `heads`.

        Args:
            quantized: `(B, N, D)`, vectors of the tokens.
            images: `(B, C, H, W)` in [-1, 1], what was encoded.
            mask: `(B, N)` bool; tokens marked False are as if they were not there.
            taps: collects features on the way; `tap_shapes` names them.
            conditions: the arguments named in `conditions`.
        """
        pictures = self.reconstruct(quantized, mask, taps=taps, **conditions)
        return {"image": Prediction(pictures, images, "pixels")}

    def tap_shapes(self) -> dict[str, Tap]:
        """Return the features that every forward offers; named as those of an encoder."""
        return {}

    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Set weights from data, once, before training; by default nothing.

        Args:
            quantized: `(M, N, D)` of the freshly initialised quantizer.
            images: the training images `(M, C, H, W)` in [-1, 1] that they come from.
        """

    @property
    def last_layer(self) -> Tensor | None:
        """Weight of the last layer, for the adaptive weight of an adversarial loss."""
        return None
