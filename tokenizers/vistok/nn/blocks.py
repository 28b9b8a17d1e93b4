"""A plain pre-norm transformer over sequences `(B, L, W)`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.core.errors import ArgumentError
from vistok.core.taps import NO_TAPS, Taps
from vistok.core.values import check
from vistok.nn.attention import AttentionKind, Mask, attend, mask_for


class Attention(nn.Module):
    """Multi-head self-attention with one fused input projection.

    Args:
        width: W, in and out.
        num_heads: divides W.
        bias: of both projections.
        qk_norm: normalise queries and keys within each head, which bounds the logits.
    """

    def __init__(
        self, width: int, num_heads: int, bias: bool = True, qk_norm: bool = False
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ArgumentError(f"num_heads={num_heads} does not divide the width {width}")
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, mask: Mask | None = None, keep: slice | None = None) -> Tensor:
        """Attend over `x` `(B, L, W)`; `mask` broadcasts to `(B, heads, L, L)`, True = visible.

        Of the tokens in `keep` alone, if it is given; `mask` must then be dense.
        """
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            head = (q.shape[-1],)
            q, k = F.layer_norm(q, head).to(v.dtype), F.layer_norm(k, head).to(v.dtype)
        if keep is not None:
            q = q[:, :, keep]
            if isinstance(mask, Tensor) and mask.shape[-2] > 1:
                mask = mask[..., keep, :]
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """A gated MLP, of as many weights as a plain one of `mlp_ratio` times W.

    Args:
        width: W, in and out.
        mlp_ratio: hidden width of the plain MLP over W; two thirds of it are used, three times.
        bias: of all layers.
        multiple: the hidden width is rounded up to a multiple of it.
    """

    def __init__(
        self, width: int, mlp_ratio: float = 4.0, bias: bool = False, multiple: int = 1
    ) -> None:
        super().__init__()
        hidden = -(-int(width * mlp_ratio * 2 / 3) // multiple) * multiple
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, W)` to `(B, L, W)`."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


#: Options of a `Block` without biases, whose norms learn nothing: a SwiGLU, and queries and keys
#: that are normalised.
NORMALIZED: Mapping[str, Any] = MappingProxyType(
    {"mlp": "swiglu", "bias": False, "qk_norm": True, "affine": False}
)


class Block(nn.Module):
    """Pre-norm attention and MLP; by default those of a ViT.

    Args:
        width: W, in and out.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over W.
        mlp: "gelu", two layers around a GELU, or "swiglu", see `SwiGLU`.
        bias: of all linear layers.
        qk_norm: normalise queries and keys, see `Attention`.
        affine: let the norms learn a scale and a shift.
        multiple: a SwiGLU's hidden width is rounded up to a multiple of it.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        bias: bool = True,
        qk_norm: bool = False,
        affine: bool = True,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        if mlp not in ("gelu", "swiglu"):
            raise ArgumentError(f"mlp={mlp}: must be gelu or swiglu")
        self.norm1 = nn.LayerNorm(width, elementwise_affine=affine)
        self.attn = Attention(width, num_heads, bias, qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=affine)
        if mlp == "swiglu":
            self.mlp: nn.Module = SwiGLU(width, mlp_ratio, bias, multiple)
        else:
            hidden = int(width * mlp_ratio)
            first, last = nn.Linear(width, hidden, bias), nn.Linear(hidden, width, bias)
            self.mlp = nn.Sequential(first, nn.GELU(), last)

    def forward(self, x: Tensor, mask: Mask | None = None, keep: slice | None = None) -> Tensor:
        """Map `(B, L, W)` to `(B, L, W)`, or to the tokens in `keep`; see `Attention`."""
        read = x if keep is None else x[:, keep]
        x = read + self.attn(self.norm1(x), mask, keep)
        return x + self.mlp(self.norm2(x))


class ModulatedBlock(Block):
    """A `NORMALIZED` block whose norms and residuals are set by a condition (AdaLN-Zero).

    The sequence has two parts, and each is modulated by maps of its own. They start at zero, so
    that the block starts as the identity (DiT, Peebles and Xie 2023; FlexTok).

    Args:
        width: W, in and out, also of the condition.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over W.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__(width, num_heads, mlp_ratio, **NORMALIZED)
        self.modulations = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor, first: int) -> Tensor:  # type: ignore[override]
        """Map `(B, L, W)` to `(B, L, W)`.

        Args:
            x: the sequence.
            condition: `(B, W)`.
            first: length of the first part.
        """
        lengths = (first, x.shape[1] - first)
        condition = F.silu(condition)[:, None]
        parts = [
            net(condition).expand(-1, length, -1)
            for net, length in zip(self.modulations, lengths, strict=True)
        ]
        gate1, gate2, shift1, scale1, shift2, scale2 = torch.cat(parts, dim=1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    """A stack of `Block`s.

    Args:
        width: W, in and out.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over W.
        activation_checkpointing: recompute each block in the backward pass; less memory, about
            a third more time, the same numbers.
        attention: how it is computed under a mask, see `AttentionKind`.
        block: further options of the blocks, see `Block`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        activation_checkpointing: bool = False,
        attention: AttentionKind = "dense",
        **block: Any,
    ) -> None:
        super().__init__()
        check("attention", attention, AttentionKind)
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, **block) for _ in range(depth)
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        keep: slice | None = None,
        taps: Taps = NO_TAPS,
        places: slice | None = None,
    ) -> Tensor:
        """Map `(B, L, W)` to `(B, L, W)`.

        Args:
            x: the sequence.
            mask: dense, as in `Attention`.
            keep: the tokens that are read afterwards, and returned; the last block computes no
                others, unless those that are tapped are others. None for all.
            taps: offered the tokens in `places` behind block i, as `block.{i}`.
            places: where the tapped tokens lie in the sequence; None for all of it.
        """
        seen = None if mask is None else mask_for(self.attention, mask, x)
        last = len(self.blocks) - 1
        narrow = keep is not None and (keep == places or not taps.wants(f"block.{last}"))
        for number, block in enumerate(self.blocks):
            args = (x, mask, keep) if narrow and number == last else (x, seen)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(*args)
            if taps.wants(f"block.{number}"):
                whole = places is None or (narrow and number == last)
                taps.offer(f"block.{number}", x if whole else x[:, places])
        return x if keep is None or narrow else x[:, keep]


@torch.no_grad()
def init_transformer_(module: nn.Module, std: float = 0.02) -> None:
    """Truncated-normal weights and zero biases for every linear layer and convolution inside."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def attend_by_position_(attention: Attention, num_position_dims: int) -> None:
    """Let an attention layer start by copying content between tokens at the same position.

    Queries and keys share an orthogonal map of the last `num_position_dims` dimensions, where the
    positions lie, and values pass the other dimensions unchanged. In the manner of mimetic
    initialisation (Trockman and Kolter 2023, https://arxiv.org/abs/2305.09828): what a trained
    model would have to find out first is there from the first step. All of it stays learned.

    Args:
        attention: of a width W, with heads of at least `num_position_dims`.
        num_position_dims: P, less than W.
    """
    width, heads = attention.proj.in_features, attention.num_heads
    shared = torch.zeros(heads, width // heads, width)
    for head in shared:
        nn.init.orthogonal_(head[:, -num_position_dims:])
    values = torch.empty(width, width)
    nn.init.orthogonal_(values)
    values[:, -num_position_dims:] = 0
    shared = shared.flatten(0, 1)
    attention.qkv.weight.copy_(torch.cat([shared, shared, values]))
    attention.proj.weight.copy_(values.T)
