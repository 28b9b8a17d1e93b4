"""A plain pre-norm transformer over sequences `(B, L, W)`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.errors import ConfigError


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over `(B, heads, L, d)`; `mask` True = visible.

    PyTorch's fused kernel, except in bf16 training on a CPU, where its backward pass takes four
    times as long as the plain products (measured at 128 tokens, torch 2.15).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention with one fused input projection.

    Args:
        width: W, in and out.
        num_heads: divides W.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"num_heads={num_heads} does not divide the width {width}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over `x` `(B, L, W)`; `mask` broadcasts to `(B, heads, L, L)`, True = visible."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = attend(q, k, v, mask)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Pre-norm attention and a GELU MLP of four times the width (TiTok, CLIP, ViT).

    Args:
        width: W, in and out.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over W.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `(B, L, W)` to `(B, L, W)`."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A stack of `Block`s.

    Args:
        width: W, in and out.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over W.
        activation_checkpointing: recompute each block in the backward pass; less memory, about
            a third more time, the same numbers.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map `(B, L, W)` to `(B, L, W)`; `mask` as in `Attention`."""
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, mask)
        return x


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
