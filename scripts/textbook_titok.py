"""Plain TiTok, written from the paper, for scripts/bench_training.py to measure against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def training_step(
    config: dict[str, Any], batch: int, device: str
) -> tuple[Callable[[], None], int]:
    """Return a training step of TiTok (Yu et al. 2024) in float32, and its operations.

    Args:
        config: of a run, whose sizes it has.
        batch: images of a step.
        device: such as "cpu".
    """
    sizes, codebook = config["tokenizer"], config["quantizer"]
    encoder, decoder = sizes["encoder"], sizes["decoder"]
    side, patch, channels = encoder["image_size"], encoder["patch_size"], encoder["channels"]
    length, grid, dim = encoder["num_latent_tokens"], side // patch, codebook["codebook_dim"]
    prefix = int(encoder["class_token"])

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            hidden = 4 * width
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm1(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.norm2(x))

    class Tower(nn.Module):
        def __init__(self, width: int, depth: int, num_heads: int, tokens: int) -> None:
            super().__init__()
            self.positions = nn.Parameter(0.02 * torch.randn(prefix + grid**2 + length, width))
            self.tokens = nn.Parameter(0.02 * torch.randn(prefix + tokens, width))
            self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
            self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))

        def forward(self, *parts: Tensor) -> Tensor:
            x = torch.cat(parts, dim=1) + self.positions
            return self.norm_out(self.blocks(self.norm_in(x)))

        def learned(self, batch: int) -> tuple[Tensor, Tensor]:
            tokens = self.tokens.expand(batch, -1, -1)
            return tokens[:, :prefix], tokens[:, prefix:]

    class TiTok(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            w, v = encoder["width"], decoder["width"]
            self.patches = nn.Conv2d(channels, w, patch, stride=patch)
            self.encoder = Tower(w, encoder["depth"], encoder["num_heads"], length)
            self.decoder = Tower(v, decoder["depth"], decoder["num_heads"], grid**2)
            self.narrow, self.widen = nn.Linear(w, dim), nn.Linear(dim, v)
            self.codes = nn.Embedding(codebook["codebook_size"], dim)
            self.pixels = nn.Conv2d(v, patch * patch * channels, 1)
            self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            batch = len(images)
            first, latents = self.encoder.learned(batch)
            x = self.encoder(first, self.patches(images).flatten(2).transpose(1, 2), latents)
            z = F.normalize(self.narrow(x[:, -length:]), dim=-1)
            codes = F.normalize(self.codes.weight, dim=-1)
            q = codes[torch.cdist(z.flatten(0, 1), codes).argmin(dim=1)].view_as(z)
            loss = 0.25 * F.mse_loss(z, q.detach()) + F.mse_loss(q, z.detach())
            first, masks = self.decoder.learned(batch)
            x = self.decoder(first, masks, self.widen(z + (q - z).detach()))
            x = x[:, prefix : prefix + grid**2].transpose(1, 2).unflatten(2, (grid, grid))
            x = self.smooth(F.pixel_shuffle(self.pixels(x), patch))
            return loss + F.mse_loss(x, images)

    model = TiTok().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(batch, channels, side, side, device=device) * 2 - 1

    def step() -> None:
        optimizer.zero_grad()
        model(images).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return step, counter.get_total_flops()
