"""Read LlamaGen's released GPTs, class-conditional, as priors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vistok.core.errors import CheckpointError
from vistok.priors.gpt import GPT
from vistok.priors.layout import Layout

#: Attention heads by width, which the weights do not tell.
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2560: 40, 2048: 32, 3200: 32, 4096: 32}

_NAMES = (
    (r"cls_embedding\.embedding_table\.weight", "told.table.weight"),
    (r"tok_embeddings\.weight", "embed.weight"),
    (r"output\.weight", "head.weight"),
    (r"norm\.weight", "transformer.norm.weight"),
    (r"layers\.(\d+)\.attention_norm\.weight", r"transformer.blocks.\1.norm1.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"transformer.blocks.\1.norm2.weight"),
    (r"layers\.(\d+)\.attention\.wqkv\.weight", r"transformer.blocks.\1.attn.qkv.weight"),
    (r"layers\.(\d+)\.attention\.wo\.weight", r"transformer.blocks.\1.attn.proj.weight"),
    (r"layers\.(\d+)\.feed_forward\.w2\.weight", r"transformer.blocks.\1.mlp.down.weight"),
    (r"layers\.(\d+)\.feed_forward\.w([13])\.weight", r"transformer.blocks.\1.mlp.gate_up.\2"),
)


def gpt_from_llamagen(
    published: Mapping[str, Tensor], grid: tuple[int, int], num_heads: int | None = None
) -> GPT:
    """Return a GPT with published weights.

    Paper: LlamaGen, Sun et al. 2024, https://arxiv.org/abs/2406.06525.

    Args:
        published: the state dict of a class-conditional model, as `core/released_weights.py` or
            `torch.load(..., weights_only=True)` reads it.
        grid: rows and columns of the tokens, (16, 16) or (24, 24).
        num_heads: attention heads; None for those of the published model of that width.

    Raises:
        CheckpointError: naming a tensor that is missing or not expected.
    """
    state: dict[str, Tensor] = {}
    for name, value in published.items():
        found = (re.fullmatch(old, name) for old, _ in _NAMES)
        places = [m.expand(new) for m, (_, new) in zip(found, _NAMES, strict=True) if m]
        if not places:
            raise CheckpointError(f"'{name}' is not expected in a class-conditional LlamaGen GPT")
        state[places[0]] = value
    for name in [name for name in state if name.endswith("gate_up.1")]:
        whole = name.removesuffix("1")
        if f"{whole}3" not in state:
            raise CheckpointError(f"'{name}' has no w3 next to its w1")
        state[f"{whole}weight"] = torch.cat([state.pop(name), state.pop(f"{whole}3")])
    for name in ("embed.weight", "told.table.weight"):
        if name not in state:
            raise CheckpointError(f"'{name}' is missing from a class-conditional LlamaGen GPT")
    codes, width = state["embed.weight"].shape
    depth = len({name.split(".")[2] for name in state if name.startswith("transformer.blocks")})
    heads = num_heads or _HEADS.get(width)
    if heads is None:
        raise CheckpointError(f"num_heads: no published GPT has width {width}; give num_heads")
    layout = Layout(
        (codes,), grid[0] * grid[1], grid, num_classes=len(state["told.table.weight"]) - 1
    )
    prior = GPT(layout, width, depth, heads)
    own = prior.state_dict()
    for name in sorted({*own, *state}):
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise CheckpointError(f"'{name}' does not fit a GPT of {depth} blocks of {width}")
    prior.load_state_dict(state)
    return prior.eval()
