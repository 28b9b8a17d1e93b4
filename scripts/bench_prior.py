"""Measure priors: cached sampling against uncached, and a training step against a plain GPT's.

    uv run scripts/bench_prior.py [--tokens 256] [--rounds 5] [--threads 1] [--precision auto]

Both are ratios within one run, of processor time, the two alternating, so that a busy machine slows
both; medians. The plain GPT is written here as nanoGPT's model is: LayerNorm, GELU, learned
positions, biases, torch's attention and AdamW, with as many parameters. Both train in the precision
that vistok's trainer would take here (`auto`: bf16 where the processor computes in it), or in the
one that is asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.priors.gpt import GPT
from vistok.priors.layout import Layout
from vistok.priors.sampling import Sampling
from vistok.training.optimizers import build_optimizer
from vistok.training.trainer import precision


class PlainBlock(nn.Module):
    """Pre-norm causal attention and a GELU MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, L, W)` to the same shape."""
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """A plain GPT like nanoGPT: learned positions, a start token, an untied head."""

    def __init__(self, codes: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(codes + 1, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the loss of ids `(B, N)`."""
        start = torch.full_like(ids[:, :1], self.tokens.num_embeddings - 1)
        x = self.tokens(torch.cat([start, ids[:, :-1]], dim=1)) + self.places.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


def parameters(module: nn.Module) -> int:
    """Return their number."""
    return sum(p.numel() for p in module.parameters())


def alternate(first: Callable[[], None], second: Callable[[], None], rounds: int) -> list[float]:
    """Return the median processor seconds of two functions, called in turn after one call each."""
    times: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for which, function in enumerate((first, second)):
            begun = time.process_time()
            function()
            if number:
                times[which].append(time.process_time() - begun)
    return [statistics.median(each) for each in times]


def stepper(
    loss: Callable[[], Tensor], module: nn.Module, optimizer: torch.optim.Optimizer, bf16: bool
) -> Callable[[], None]:
    """Return a function that takes one training step, with the clipping that both recipes have."""

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> int:
    """Run both; exit code 1 if a ratio is below what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=4, help="drawn at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("auto", "bf16", "32"), default="auto")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    torch.manual_seed(0)
    side = round(words.tokens**0.5)
    grid = (side, side) if side * side == words.tokens else None
    layout = Layout((words.codes,), words.tokens, grid, num_classes=10)
    tiny = {"width": 192, "depth": 6, "num_heads": 6, "multiple": 32, "dropout": 0.0}
    prior = GPT(layout, **tiny, token_dropout=0.0).eval()  # type: ignore[arg-type]
    condition = prior.condition([0] * words.images)
    cached, anew = alternate(
        lambda: prior.generate(condition, Sampling()) and None,
        lambda: prior.generate(condition, Sampling(), cached=False) and None,
        max(1, words.rounds // 3),
    )
    print(f"sampling {words.images} x {words.tokens} tokens: cached {cached:.2f} s, without "
          f"{anew:.2f} s, {anew / cached:.1f} times as fast")  # fmt: skip

    ids = torch.randint(words.codes, (words.batch, words.tokens))
    labels = prior.condition([i % 10 for i in range(words.batch)])
    prior.train()
    plain = PlainGPT(words.codes, words.tokens, 192, 6, 6)
    print(f"parameters: GPT {parameters(prior):,}, plain {parameters(plain):,}")
    ours = build_optimizer(prior, 1e-3, (0.9, 0.95), 0.05)
    theirs = torch.optim.AdamW(plain.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.05)
    bf16 = precision(words.precision, "cpu") == "bf16-mixed"
    step, plain_step = alternate(
        stepper(lambda: prior(ids[..., None], None, labels).nll.mean(), prior, ours, bf16),
        stepper(lambda: plain(ids), plain, theirs, bf16),
        words.rounds,
    )
    print(f"training step of {words.batch} x {words.tokens} tokens in "
          f"{'bf16' if bf16 else 'float32'}: GPT {step:.3f} s, plain {plain_step:.3f} s, "
          f"{plain_step / step:.2f} times as fast")  # fmt: skip
    return int(anew / cached < 5 or plain_step / step < 1)


if __name__ == "__main__":
    sys.exit(main())
