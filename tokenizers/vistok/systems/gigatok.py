"""GigaTok: a CNN around a Q-Former, up to three billion parameters."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released
from vistok.models.qformer_weights import released_qformer
from vistok.models.tokenizer import Tokenizer


@register("gigatok")
class GigaTok(Tokenizer):
    """A CNN, a Q-Former to a 1D code, a Q-Former back to a grid, and a CNN.

    The paper's semantic regularisation, without which the large sizes give codes that are hard
    to model, is `alignment.*` of the run: the decoder's third block against DINOv2-B, weight
    0.5. Its entropy loss is `quantizer.entropy_weight`.

    The forward is the released one. How weights start differs (positions are learned from sines and
    cosines on, the adaptive norms start as plain ones), and there is no auxiliary decoding of the
    CNN's own features, which its authors advise to drop.

    Paper: Xiong et al. 2025, https://arxiv.org/abs/2504.08736.
    Parts: `QFormerEncoder`, `QFormerDecoder`.
    """

    # Full attention on both sides; queries start coarse to fine, but nothing is dropped.
    token_order = "unordered"


@register("gigatok", kind="importer")
def gigatok(published: Published, image_size: int | None) -> Released:
    """GigaTok (https://arxiv.org/abs/2504.08736) with a codebook and a Q-Former."""
    return released_qformer(published, image_size, {"_target_": "gigatok"})
