"""Q-Former: queries that attend to each other and read a memory (DETR's decoder, pre-norm)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.core.errors import ArgumentError
from vistok.core.taps import NO_TAPS, Taps
from vistok.nn.attention import attend
from vistok.nn.halves import half_offset, side_of
from vistok.nn.positions import level_points, position_table, shift_matrix


class CrossAttention(nn.Module):
    """Multi-head attention whose queries, keys and values come from different places.

    Args:
        width: W, in and out.
        num_heads: divides W.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ArgumentError(f"num_heads={num_heads} does not divide the width {width}")
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """`(B, L, W)` from queries `(B, L, W)`, keys and values `(B, M, W)`.

        `mask` broadcasts to `(B, heads, L, M)`, True = visible.
        """
        pairs = ((self.q, queries), (self.k, keys), (self.v, values))
        q, k, v = (net(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for net, x in pairs)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class QFormerBlock(nn.Module):
    """Self-attention of the queries, attention to the memory, GELU MLP; positions in q and k.

    Args:
        width: W, in and out.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over W.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = CrossAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = CrossAttention(width, num_heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        positions: Tensor,
        memory_positions: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map queries `(B, L, W)` to `(B, L, W)`, reading memory `(B, M, W)`.

        Args:
            x: the queries.
            memory: what they read.
            positions: `(L, W)` of the queries.
            memory_positions: `(M, W)` of the memory.
            mask: `(B, M)` bool; memory marked False is as if it were not there.
        """
        if mask is not None:
            mask = mask[:, None, None]
        y = self.norm1(x)
        x = x + self.self_attn(y + positions, y + positions, y)
        y = self.norm2(x) + positions
        x = x + self.cross_attn(y, memory + memory_positions, memory, mask)
        return x + self.mlp(self.norm3(x))


class QFormer(nn.Module):
    """A stack of `QFormerBlock`s.

    Args:
        width: W, in and out.
        depth: number of blocks.
        num_heads: attention heads.
        activation_checkpointing: recompute each block in the backward pass.
    """

    def __init__(
        self, width: int, depth: int, num_heads: int, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(QFormerBlock(width, num_heads) for _ in range(depth))

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        positions: Tensor,
        memory_positions: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
    ) -> Tensor:
        """Map queries as a block does; taps are offered them behind block i, as `block.{i}`."""
        for number, block in enumerate(self.blocks):
            inputs = (x, memory, positions, memory_positions, mask)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(*inputs)
            taps.offer(f"block.{number}", x)
        return x


def pooling_pyramid(count: int) -> list[tuple[int, int]]:
    """Grids of 1, 1, 2, 4, ... cells that add up to `count`, each next one twice as fine.

    1x1, 1x1, 1x2, 2x2, 2x4, 4x4, ...

    Raises:
        ConfigError: if `count` is not a power of two.
    """
    if count < 1 or count & (count - 1):
        raise ArgumentError(f"num_latent_tokens={count}: pooled queries need a power of two")
    exponents = range(count.bit_length() - 1)
    return [(1, 1), *((2 ** (e // 2), 2 ** ((e + 1) // 2)) for e in exponents)]


def token_positions(
    count: int, width: int, grid: tuple[int, int], padding_start: int | None = None
) -> Tensor:
    """Positions `(count + M, width)` of a 1D code: the centres of what its queries average.

    With a little noise, or queries of equal content at one place would stay equal for ever.

    Args:
        count: N, the length of the code, a power of two.
        width: of the stream; positions start in its second half.
        grid: rows and columns of the image's cells.
        padding_start: repeat the tokens from this one on as M = N - padding_start more; None
            for none.

    Raises:
        ConfigError: if `padding_start` names no token.
    """
    points = level_points(pooling_pyramid(count), grid)
    table = position_table(points, width, width // 2, grid)
    if padding_start is not None:
        if not 0 <= padding_start < count:
            raise ArgumentError(
                f"padding_start={padding_start}: must be 0 to {count - 1}, or "
                f"null, with num_latent_tokens={count}; an eighth of it, as published, is "
                f"{count // 8}"
            )
        table = torch.cat([table, table[padding_start:]])
    return table + 0.02 * torch.randn_like(table)


@torch.no_grad()
def read_by_position_(
    attention: CrossAttention,
    num_position_dims: int,
    level: tuple[int, int],
    grid: tuple[int, int],
) -> None:
    """Let queries start by copying from the memory whose position is near theirs.

    As `attend_by_position_` does for self-attention, and for the same reason: grid queries that
    all start as one token would otherwise stay alike for long. Half of the heads read before a
    query's place and half of them behind it, see `nn/halves.py`: so a token finds both halves of
    its part, and a cell that reads tokens knows which half it is.

    Args:
        attention: of queries and keys that carry positions, and values that don't.
        num_position_dims: P, the last dimensions, where the positions lie.
        level: the finest of the tokens' grids.
        grid: rows and columns of the image's cells.
    """
    width, heads = attention.proj.in_features, attention.num_heads
    keys = torch.zeros(heads, width // heads, width)
    queries = keys.clone()
    for number in range(heads):
        nn.init.orthogonal_(keys[number, :, -num_position_dims:])
        offset = [side_of(number, heads) * along for along in half_offset(level, grid)]
        moved = shift_matrix(offset, num_position_dims, grid)
        queries[number, :, -num_position_dims:] = keys[number, :, -num_position_dims:] @ moved
    attention.q.weight.copy_(queries.flatten(0, 1))
    attention.k.weight.copy_(keys.flatten(0, 1))
    nn.init.orthogonal_(attention.v.weight)
    attention.proj.weight.copy_(attention.v.weight.T)
