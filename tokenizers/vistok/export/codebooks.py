"""The tables of a tokenizer's codes: as they are compared, and as the decoder receives them."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.models.tokenizer import Tokenizer

#: Implicit codebooks of more codes are not written out; `vocabulary.json` has their digits.
LARGEST_TABLE = 2**20


@torch.no_grad()
def codebook_tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the tables in which a downstream model looks ids up.

    `codebook.q` `(K_q, d_q)` for every index slot q: the vectors that distances are measured
    between (of unit length for cosine codebooks). With one slot also `decoder_input` `(K, D)`:
    row i is the vector that the decoder gets for id i. With several slots whose vectors add up,
    `decoder_input.q` `(K_q, D)` for each and `decoder_bias` `(D,)`: the decoder gets the bias and
    one row of each table. Codes that only mean something together (multi-scale) have neither.
    """
    tensors: dict[str, Tensor] = {}
    if not _is_described(tokenizer):
        tensors |= {f"codebook.{q}": table for q, table in enumerate(tokenizer.codebooks())}
    sizes = tokenizer.quantizer.codebook_sizes
    if max(sizes) <= LARGEST_TABLE and tokenizer.quantizer.per_token:
        if len(sizes) == 1:
            tensors["decoder_input"] = _decoded(tokenizer, torch.arange(sizes[0])[:, None])
        else:
            tensors |= _summands(tokenizer)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _is_described(tokenizer: Tokenizer) -> bool:
    """Return whether the codebook is an implicit one that is too large to be written out."""
    quantizer = tokenizer.quantizer
    return quantizer.digits() is not None and max(quantizer.codebook_sizes) > LARGEST_TABLE


def codebook_dims(tokenizer: Tokenizer) -> list[int]:
    """Return the width of the codes of each slot."""
    digits = tokenizer.quantizer.digits()
    if digits is not None:
        return [len(digits)] * tokenizer.quantizer.num_indices
    return [table.shape[1] for table in tokenizer.codebooks()]


def _decoded(tokenizer: Tokenizer, ids: Tensor) -> Tensor:
    """Return the decoder's vectors `(M, D)` of M tokens `(M, Q)`, each by itself."""
    return tokenizer.quantizer.decode(ids[None].to(tokenizer.device))[0]


def _summands(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return a table for each slot whose rows add up; nothing if they don't."""
    sizes = tokenizer.quantizer.codebook_sizes
    bias = _decoded(tokenizer, torch.zeros(1, len(sizes), dtype=torch.long))[0]
    tables = []
    for slot, size in enumerate(sizes):
        ids = torch.zeros(size, len(sizes), dtype=torch.long)
        ids[:, slot] = torch.arange(size)
        tables.append(_decoded(tokenizer, ids) - bias)
    generator = torch.Generator().manual_seed(0)
    tried = torch.stack([torch.randint(s, (256,), generator=generator) for s in sizes], dim=1)
    found = bias + sum(table[tried[:, slot]] for slot, table in enumerate(tables))
    wanted = _decoded(tokenizer, tried)
    if not torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-4):
        return {}
    return {"decoder_bias": bias} | {f"decoder_input.{q}": t for q, t in enumerate(tables)}
