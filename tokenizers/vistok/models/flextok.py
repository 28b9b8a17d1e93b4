"""FlexTok: nested registers and a flow that paints from any prefix of them."""

from vistok.models.flexible import FlexibleTokenizer


class FlexTok(FlexibleTokenizer):
    """Causal registers, FSQ, nested dropout per image and a rectified-flow decoder.

    Paper: Bachmann et al. 2025, https://arxiv.org/abs/2502.13967. The paper's flow runs in the
    latents of a frozen autoencoder; this one runs in pixels, and without feature alignment.
    Parts: `LatentTransformerEncoder` with causal=true and block="flextok", `FlowDecoder`, `FSQ`
    with levels 8, 8, 8, 5, 5, 5.
    """
