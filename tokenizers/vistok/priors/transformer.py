"""The transformer of all priors: RMSNorm, SwiGLU, rotary positions, no biases (LlamaGen's)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.core.errors import ArgumentError
from vistok.core.sample_random import chances
from vistok.nn.attention import attend
from vistok.nn.blocks import SwiGLU
from vistok.nn.norms import RMSNorm
from vistok.nn.rotary import rotation


def line_rotation(places: Tensor, head_dim: int, theta: float = 1e4) -> Tensor:
    """Cosines and sines `(2, L, head_dim / 2)` of places `(L,)` on a line."""
    if head_dim % 2:
        raise ArgumentError(f"num_heads: heads of width {head_dim}, must be a multiple of 2")
    steps = torch.arange(head_dim // 2) / (head_dim // 2)
    angles = places.float()[:, None] * theta**-steps
    return torch.stack([angles.cos(), angles.sin()])


def turns(points: Tensor, head_dim: int, prefix: int, zero: bool) -> Tensor:
    """Rotary positions of a sequence whose first `prefix` tokens have none.

    Args:
        points: `(L, 2)` on a grid, or `(L,)` on a line.
        head_dim: width of an attention head.
        prefix: tokens in front, of the condition.
        zero: let their queries and keys be zero, as in LlamaGen's code: the others then look at
            all of them alike. Otherwise they are not turned.

    Returns:
        `(prefix + L, head_dim / 2, 2)`, for `turned`.
    """
    rotate = rotation if points.ndim == 2 else line_rotation
    table = rotate(points, head_dim).permute(1, 2, 0)
    front = torch.zeros(prefix, head_dim // 2, 2)
    if not zero:
        front[..., 0] = 1
    return torch.cat([front, table]).contiguous()


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of `(B, L, ..., d)` by its angle, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    angles = torch.view_as_complex(turn.float())
    angles = angles.view(len(turn), *[1] * (x.ndim - 3), -1)
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Dropout whose random numbers belong to the samples `(B, ...)`."""
    if not training or not share:
        return x
    return x * chances(1 - share, x.shape, x.device) / (1 - share)


@dataclass
class Cache:
    """Keys and values of what a layer has seen, `(B, heads, L, d)`, up to `length`."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of further places; return all."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class SelfAttention(nn.Module):
    """Attention whose queries and keys are turned by position.

    Args:
        width: W, in and out.
        num_heads: divides W.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ArgumentError(f"num_heads={num_heads} does not divide the width {width}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend over `(B, L, W)`, and over what the cache holds."""
        # Split, for slices have gradients that are mostly zeros.
        qk, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).split((2, 1), dim=2)
        q, k = turned(qk, turn).permute(2, 0, 3, 1, 4)
        v = v.squeeze(2).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.proj(attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))


class PriorBlock(nn.Module):
    """Pre-norm attention and SwiGLU.

    Args:
        width: W, in and out.
        num_heads: attention heads.
        multiple: the hidden width, 8/3 of W, is rounded up to a multiple of it.
        dropout: of what attention and MLP add, 0 to 1.
    """

    def __init__(self, width: int, num_heads: int, multiple: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, multiple=multiple)
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """Map `(B, L, W)` to `(B, L, W)`."""
        added = self.attn(self.norm1(x), turn, mask, causal, cache)
        x = x + dropped(added, self.dropout, self.training)
        return x + dropped(self.mlp(self.norm2(x)), self.dropout, self.training)


class PriorTransformer(nn.Module):
    """Blocks and a norm.

    Args:
        width: W, in and out.
        depth: number of blocks.
        num_heads: attention heads.
        multiple: see `PriorBlock`.
        dropout: see `PriorBlock`.
        activation_checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        multiple: int,
        dropout: float,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.activation_checkpointing = activation_checkpointing
        # Sharded training gathers the members of a list named `blocks` one by one.
        self.blocks = nn.ModuleList(
            PriorBlock(width, num_heads, multiple, dropout) for _ in range(depth)
        )
        self.norm = RMSNorm(width)

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """Return what the heads see, not normalised: `(B, L, W)`.

        Args:
            x: `(B, L, W)`.
            turn: `(L, d / 2, 2)` of these places, see `turns`.
            mask: `(L, L)` bool, True = visible.
            causal: in place of a mask, let each place see itself and those before it.
            caches: of each block, which this extends; the places then see all that is in them.
        """
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled() and caches is None:
                x = checkpoint(block, x, turn, mask, causal, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, turn, mask, causal, caches[number] if caches else None)
        return x

    def caches(self, batch: int, length: int, like: Tensor) -> list[Cache]:
        """Return empty caches for sequences of `length`, of the type and place of `like`."""
        head = like.shape[-1] // self.num_heads
        shape = (batch, self.num_heads, length, head)
        return [Cache(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.blocks]


@torch.no_grad()
def init_prior_(module: nn.Module, deviation: float = 0.02) -> None:
    """Draw all weights from a normal distribution; norms start as they are made."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=deviation)


def nll_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return minus the log-likelihood of ids `(...)` under logits `(..., K)`, float32, in nats."""
    flat = F.cross_entropy(
        logits.float().flatten(0, -2), ids.flatten(), reduction="none", ignore_index=-1
    )
    return flat.view(ids.shape)
