"""VAR's multi-scale tokenizer, and its released weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistok.core.errors import CheckpointError, as_written
from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer
from vistok.models.grid import GridTokenizer
from vistok.quantizers.multi_scale_vq import VAR_SCALES


@register("var_tokenizer")
class VARTokenizer(GridTokenizer):
    """VQGAN's CNN around a residual quantizer over scales, 1x1 to the whole grid.

    Paper: Tian et al. 2024, https://arxiv.org/abs/2404.02905. Parts: `CNNEncoder`, `CNNDecoder`,
    `MultiScaleVQ`.
    """


@register("var", kind="importer")
@recognized(
    "shared convolutions `quant_resi` between scales",
    lambda p: p.has("quantize.quant_resi"),
)
def var(published: Published, image_size: ImageSize | None) -> Released:
    """VAR's multi-scale VQ (https://arxiv.org/abs/2404.02905)."""
    # How often each scale has used each code: the file says how many scales there are, not which.
    hits = published.left.pop("quantize.ema_vocab_hit_SV", None)
    scales = _scales(published.said())
    if hits is not None and len(hits) != len(scales):
        raise published.misfit(
            f"it has {len(hits)} scales, not the {len(scales)} of {scales}; a config with "
            "v_patch_nums says which: config=FILE"
        )
    codes = published.take("quantize.embedding.weight")
    # One convolution for all scales is not in a list.
    shared = "quantize.quant_resi.qresi.weight" in published.left
    count = 1 if shared else published.count("quantize.quant_resi.qresi_ls")
    if not count:
        raise published.misfit("'quantize.quant_resi' is missing")
    lists = {f"quantize.quant_resi.qresi_ls.{n}": f"quantizer.phi.{n}" for n in range(count)}
    state = published.move({"quantize.quant_resi.qresi": "quantizer.phi.0"} if shared else lists)
    tokenizer, cnn_state = grid_tokenizer(published, "var_tokenizer", image_size or 16 * scales[-1])
    quantizer = {
        "_target_": "multi_scale_vq",
        "dim": codes.shape[1],
        "codebook_size": len(codes),
        "codebook_dim": codes.shape[1],
        "scales": scales,
        "num_phi": count,
        "phi_ties": "later",
        "metric": "euclidean",
        "codebook": "gradient",
        "kmeans_init": False,
        "revival": "none",
    }
    state |= cnn_state | {"quantizer.books.0.embedding": codes}
    return Released(tokenizer, quantizer, state, "MIT")


def _scales(said: Mapping[str, Any]) -> list[int]:
    """Return the scales that the authors' config names, or the published ones."""
    scales = said.get("v_patch_nums", said.get("patch_nums", list(VAR_SCALES)))
    scales = list(scales) if isinstance(scales, (list, tuple)) else [scales]
    if not all(isinstance(scale, int) and scale > 0 for scale in scales) or not scales:
        raise CheckpointError(
            f"config: v_patch_nums={as_written(scales)}; must be sides of grids, such as [1, 2, 4]"
        )
    return scales
