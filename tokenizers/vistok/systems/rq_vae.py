"""RQ-VAE, and its released weights."""

from __future__ import annotations

from vistok.core.registry import register
from vistok.core.released_weights import Published, Released, recognized
from vistok.core.values import ImageSize
from vistok.models.cnn_weights import grid_tokenizer
from vistok.models.grid import GridTokenizer


@register("rq_vae")
class RQVAE(GridTokenizer):
    """VQGAN's CNN around a residual quantizer; several ids per cell of a coarse grid.

    Paper: Lee et al. 2022, https://arxiv.org/abs/2203.01941. Parts: `CNNEncoder`, `CNNDecoder`,
    `ResidualVQ`.
    """


@register("rq_vae", kind="importer")
@recognized(
    "codebooks for each depth",
    lambda p: p.has("quantizer.codebooks.0", "encoder.down"),
)
def rq_vae(published: Published, image_size: ImageSize | None) -> Released:
    """RQ-VAE (https://arxiv.org/abs/2203.01941)."""
    depth = published.count("quantizer.codebooks")
    tables = []
    for n in range(depth):
        # The last row stands for no code.
        tables.append(published.take(f"quantizer.codebooks.{n}.weight")[:-1])
        published.drop(*(f"quantizer.codebooks.{n}.{end}" for end in ("cluster_size", "embed_ema")))
    # One shared codebook is in the file once for each depth.
    shared = depth > 1 and all(table.equal(tables[0]) for table in tables[1:])
    tokenizer, state = grid_tokenizer(published, "rq_vae", image_size or 256)
    for n, table in enumerate(tables[:1] if shared else tables):
        state[f"quantizer.books.{n}.embedding"] = table
    quantizer = {
        "_target_": "residual_vq",
        "dim": tables[0].shape[1],
        "codebook_size": len(tables[0]),
        "codebook_dim": tables[0].shape[1],
        "num_layers": depth,
        "shared": shared,
        "codebook": "gradient",
        "kmeans_init": False,
        "revival": "none",
    }
    return Released(tokenizer, quantizer, state, "Apache-2.0")
