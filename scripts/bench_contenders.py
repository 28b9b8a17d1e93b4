"""Build what bench_quantizers.py measures: our quantizers, those of other libraries, textbooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor], object]


class Textbook(nn.Module):
    """VQ the usual way: the whole distance matrix, then one-hots."""

    def __init__(self, dim: int, codes: int, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.embedding = nn.Parameter(torch.randn(codes, dim), requires_grad=rule != "ema")
        self.counts, self.sums = torch.ones(codes), self.embedding.detach().clone()

    def distances(self, z: Tensor) -> Tensor:
        """Squared distances `(N, K)`."""
        e = self.embedding
        return z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.t()

    def ids(self, z: Tensor) -> Tensor:
        """Indices `(N,)`."""
        if self.rule == "ibq":
            return (z @ self.embedding.t()).argmax(1)
        return self.distances(z).argmin(1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized vectors `(N, d)` and the weighted loss."""
        e = self.embedding
        if self.rule == "ibq":
            logits = z @ e.t()
            p = logits.softmax(1)
            hard = F.one_hot(logits.argmax(1), len(e)).float()
            quantized, q = (hard + p - p.detach()) @ e, hard @ e
            loss = F.mse_loss(quantized, z) + F.mse_loss(z, q.detach())
            return quantized, loss + 0.25 * F.mse_loss(q, z.detach())
        ids = self.distances(z).argmin(1)
        hard = torch.zeros(len(z), len(e)).scatter_(1, ids[:, None], 1)
        q = hard @ e
        loss = 0.25 * F.mse_loss(z, q.detach())
        if self.rule == "gradient":
            loss = loss + F.mse_loss(q, z.detach())
        else:
            with torch.no_grad():
                self.counts.lerp_(hard.sum(0), 0.01)
                self.sums.lerp_(hard.t() @ z, 0.01)
                self.embedding.copy_(self.sums / self.counts[:, None])
        return z + (q - z).detach(), loss


def textbook(dim: int, codes: int, rule: str) -> tuple[Step, Step]:
    """Train and encode steps of `Textbook`."""
    module = Textbook(dim, codes, rule)

    def train(z: Tensor) -> None:
        quantized, loss = module(z)
        (quantized.sum() + loss).backward()
        module.zero_grad(set_to_none=True)

    return train, module.ids


def vqp(name: str, **options: object) -> tuple[Step, Step]:
    """Train and encode steps of a class of vector-quantize-pytorch."""
    import vector_quantize_pytorch

    module = getattr(vector_quantize_pytorch, name)(**options)

    def train(z: Tensor) -> None:
        module.train()
        out = module(z[None])
        loss = out[0].sum()
        for extra in out[2:3]:  # FSQ has none, ResidualVQ one per layer
            loss = loss + extra.sum()
        loss.backward()
        module.zero_grad(set_to_none=True)

    def encode(z: Tensor) -> object:
        module.eval()
        return module(z[None])[1]

    return train, encode


def ours(name: str, dim: int, **overrides: object) -> tuple[Step, Step]:
    """The shipped config, on a tokenizer of width `dim`."""
    from vistok.core.registry import build

    module = build({**shipped(name, dim), **overrides}, "quantizer")

    def train(z: Tensor) -> None:
        module.train()
        out = module(z[None])
        loss = out.quantized.sum()
        for key, value in out.losses.items():
            loss = loss + module.loss_weights[key] * value
        loss.backward()
        module.after_step()
        module.zero_grad(set_to_none=True)

    def encode(z: Tensor) -> object:
        module.eval()
        return module.encode(z[None])

    return train, encode


def shipped(name: str, dim: int) -> dict[str, Any]:
    """The config of `quantizer=name` on a tokenizer of width `dim`, as plain containers."""
    from vistok.core.configuration import compose, to_container

    words = ["~experiment", f"quantizer={name}", f"tokenizer.latent_dim={dim}"]
    return to_container(compose("train", words))["quantizer"]


def matmul(dim: int, codes: int, tokens: int, reuse: bool, layers: int = 1) -> tuple[Step, Step]:
    """The product of all latents with all codes, `layers` times, and nothing else."""
    table = torch.randn(codes, dim)
    buffer = torch.zeros(tokens * codes) if reuse else None

    def product(z: Tensor) -> None:
        for _ in range(layers):
            if buffer is None:
                z.detach() @ table.t()
            else:
                out = buffer[: len(z) * codes].view(len(z), codes)
                torch.mm(z.detach(), table.t(), out=out)

    return product, product


def contenders(method: str, dim: int, codes: int, tokens: int) -> dict[str, tuple]:
    """Name -> (constructor, its arguments) of everything that `method` is compared with."""
    book = {"codebook_size": codes, "codebook_dim": dim}
    plain = {"kmeans_init": False, "metric": "euclidean"}
    library = {"dim": dim, "codebook_size": codes, "rotation_trick": False}
    products = {
        "matmul": (matmul, (dim, codes, tokens, False), {}),
        "matmul_reused": (matmul, (dim, codes, tokens, True), {}),
    }
    if method == "ema_vq":
        return {
            "ours": (ours, ("ema_vq", dim), book | plain),
            "vqp": (vqp, ("VectorQuantize",), library | EMA),
            "textbook": (textbook, (dim, codes, "ema"), {}),
            **products,
        }
    if method == "vq":
        return {
            "ours": (ours, ("vq", dim), book | plain),
            "vqp": (vqp, ("VectorQuantize",), library | LEARNED),
            "textbook": (textbook, (dim, codes, "gradient"), {}),
            **products,
        }
    if method == "simvq":
        return {
            "ours": (ours, ("simvq", dim), book),
            "vqp": (vqp, ("SimVQ",), library),
            **products,
        }
    if method == "ibq":
        return {
            "ours": (ours, ("ibq", dim), book | {"entropy_weight": 0.0}),
            "ours+entropy": (ours, ("ibq", dim), book),
            "textbook": (textbook, (dim, codes, "ibq"), {}),
            **products,
        }
    if method in VARIANTS:
        config, overrides, options = VARIANTS[method]
        return {
            "ours": (ours, (config, dim), book | {"kmeans_init": False} | overrides),
            "vqp": (vqp, ("VectorQuantize",), library | options),
        }
    if method in ("lfq", "bsq"):
        spherical = {"spherical": method == "bsq"}
        size = {"dim": 18, "codebook_size": 2**18}
        exact = {"ours (joint)": (ours, ("bsq", 18), {"entropy": "joint"})}
        return {
            "ours": (ours, (method, 18), {}),
            **(exact if method == "bsq" else {}),
            "vqp": (vqp, ("LFQ",), size | spherical),
        }
    if method == "fsq_64k":
        levels = [8, 8, 8, 5, 5, 5]
        return {
            "ours": (ours, ("fsq_64k", 6), {}),
            "vqp": (vqp, ("FSQ",), {"levels": levels}),
        }
    layers = {"kmeans_init": False, "codebook_size": 1024}
    return {
        "ours": (ours, ("residual_vq", 128), layers | {"num_layers": 8}),
        "vqp": (
            vqp,
            ("ResidualVQ",),
            layers | {"dim": 128, "num_quantizers": 8, "rotation_trick": False, "decay": 0.99},
        ),
        "matmul": (matmul, (128, 1024, tokens, False, 8), {}),
        "matmul_reused": (matmul, (128, 1024, tokens, True, 8), {}),
    }


EMA = {"decay": 0.99}
LEARNED = {"learnable_codebook": True, "ema_update": False}
PLAIN = {"metric": "euclidean"}
# The rest of what both libraries have: our config, its overrides, the library's options.
VARIANTS: dict[str, tuple[str, dict, dict]] = {
    "cosine": ("ema_vq", {"metric": "cosine"}, EMA | {"use_cosine_sim": True}),
    "rotation": ("vq_rotation", PLAIN, EMA | {"rotation_trick": True}),
    "diveq": (
        "vq_diveq",
        PLAIN,
        LEARNED | {"directional_reparam": True, "threshold_ema_dead_code": 2},
    ),
    "synchronous": ("vq_synchronous", PLAIN, LEARNED | {"sync_update_v": 1.0}),
    "stochastic": ("vq_stochastic", PLAIN, EMA | {"stochastic_sample_codes": True}),
    "gumbel": (
        "vq_gumbel",
        PLAIN,
        EMA | {"stochastic_sample_codes": True, "straight_through": True},
    ),
}
CODEBOOK_METHODS = ("ema_vq", "vq", "simvq", "ibq", *VARIANTS)
FIXED = {"lfq": "2^18", "bsq": "2^18", "fsq_64k": "64000", "residual_vq": "8x1024x128"}
WIDTHS = {"lfq": 18, "bsq": 18, "fsq_64k": 6, "residual_vq": 128}
METHODS = (*CODEBOOK_METHODS, *FIXED)
ONE_CODEBOOK = ("vq", "ema_vq", "simvq", "ibq")  # how the names of their configs begin
