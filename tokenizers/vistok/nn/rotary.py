"""Transformer blocks whose queries and keys are turned by 2D positions (ResTok's)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.nn.attention import Mask, attend
from vistok.nn.halves import side_of

#: Scales that `attend_by_place_` sets: of the content in keys, and of the place in queries, which
#: must outweigh their content before the norm.
_CONTENT, _OVER_CONTENT = 0.1, 4.0


def rotation(points: Tensor, head_dim: int, theta: float = 1e4) -> Tensor:
    """Cosines and sines `(2, L, head_dim / 2)` for `rotate`.

    Half of the angles come from the rows, half from the columns: axial rotary positions (RoFormer,
    Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Args:
        points: `(L, 2)` row and column of each token.
        head_dim: width of an attention head, a multiple of 4.
        theta: the longest wavelength over 2 pi, nearly.
    """
    if head_dim % 4:
        raise ArgumentError(f"num_heads: heads of width {head_dim}, must be a multiple of 4")
    steps = torch.arange(head_dim // 4) / (head_dim // 4)
    angles = (points.float()[:, :, None] * theta**-steps).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of `(..., L, head_dim)` by its angle."""
    cos, sin = turn.to(x.dtype)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class RotaryAttention(nn.Module):
    """Self-attention with normalised queries and keys, turned by position; keys have no bias.

    Args:
        width: W, in and out.
        num_heads: divides W into heads of a multiple of 4.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ArgumentError(f"num_heads={num_heads} does not divide the width {width}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.q_norm = nn.LayerNorm(width // num_heads)
        self.k_norm = nn.LayerNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: Tensor, mask: Mask | None = None) -> Tensor:
        """Attend over `(B, L, W)`; `mask` broadcasts to `(B, heads, L, L)`, True = visible."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (q + self.q_bias, k, v + self.v_bias)
        )
        q, k = rotate(self.q_norm(q), turn).to(v.dtype), rotate(self.k_norm(k), turn).to(v.dtype)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class RotaryBlock(nn.Module):
    """Pre-norm attention and GELU MLP, each scaled per channel (LayerScale) before it is added.

    Args:
        width: W, in and out.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over W.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attn = RotaryAttention(width, num_heads)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(
        self,
        x: Tensor,
        turn: Tensor,
        mask: Mask | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Map `(B, L, W)` to `(B, L', W)`.

        Args:
            x: the sequence.
            turn: `(2, L, head / 2)` of its positions, see `rotation`.
            mask: as in `RotaryAttention`.
            between: what happens to the sequence between attention and MLP; it may change L.
        """
        x = x + self.scale1 * self.attn(self.norm1(x), turn, mask)
        if between is not None:
            x = between(x)
        return x + self.scale2 * self.mlp(self.norm2(x))


@torch.no_grad()
def attend_by_place_(
    attention: RotaryAttention, strength: float = 4.0, offset: tuple[float, float] = (0.0, 0.0)
) -> None:
    """Let rotary attention start by copying content between tokens that lie near each other.

    Queries and keys start with one vector in common, in the three fastest turning pairs of each
    axis. Turned, its product with itself falls with the distance; values pass unchanged. What
    `attend_by_position_` is for positions that are added.

    Args:
        attention: any.
        strength: of the logit, per pair.
        offset: rows and columns; the first half of the heads reads so far before a token's place,
            the others so far behind it. See `nn/halves.py`.
    """
    width, heads = attention.proj.in_features, attention.num_heads
    head = width // heads
    pairs = torch.arange(head // 2).unflatten(0, (2, -1))[:, :3]
    size = strength * head**0.5  # of a pair's vector, squared
    # A norm takes the mean of a query off. It is zero, and nearly so when the query is turned:
    # where the first pair's goes up, the others' go down.
    signs = torch.tensor([1.0, -1.0, -1.0])[: pairs.shape[1]].expand_as(pairs).flatten()
    pairs = pairs.flatten()
    common = torch.zeros(head // 2, 2)
    common[pairs] = (size / 2) ** 0.5 * torch.stack([signs, -signs], dim=1)
    common = common.flatten()
    attention.k_norm.bias.copy_(common)
    attention.k_norm.weight.fill_(_CONTENT)
    for number, bias in enumerate(attention.q_bias.unflatten(0, (heads, head))):
        place = side_of(number, heads) * torch.tensor([offset])
        bias.copy_(_OVER_CONTENT * rotate(common[None], rotation(place, head))[0])
    attention.q_norm.weight.fill_((size * len(pairs) / head) ** 0.5)  # takes the norm off again
    values = torch.empty(width, width)
    nn.init.orthogonal_(values)
    attention.qkv.weight[2 * width :] = values
    attention.proj.weight.copy_(values.T)
