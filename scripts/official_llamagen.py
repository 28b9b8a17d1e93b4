"""The step and the encoding of LlamaGen's own tokenizer, for scripts/bench_training.py.

Nothing of that code is here: whoever measures has a checkout of
https://github.com/FoundationVision/LlamaGen, and names it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def calls_of(
    checkout: Path, config: dict[str, Any], batch: int, device: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Return calls of a training step and of encoding, in float32, and the step's operations.

    The step is that of their `vq_train.py` without LPIPS and the discriminator.

    Args:
        checkout: the root of the repository.
        config: of our run, whose sizes it has.
        batch: images of a step.
        device: such as "cpu".

    Raises:
        FileNotFoundError: if it is not a checkout of LlamaGen.
    """
    place = checkout / "tokenizer" / "tokenizer_image"
    if not (place / "vq_model.py").is_file():
        raise FileNotFoundError(
            f"official={checkout}: has no tokenizer/tokenizer_image/vq_model.py"
        )
    sys.path.insert(0, str(place))
    import vq_model  # pyright: ignore[reportMissingImports]

    encoder, codebook = config["tokenizer"]["encoder"], config["quantizer"]
    multipliers = list(encoder["channel_multipliers"])
    model = vq_model.VQModel(
        vq_model.ModelArgs(
            codebook_size=codebook["codebook_size"],
            codebook_embed_dim=codebook["codebook_dim"],
            encoder_ch_mult=multipliers,
            decoder_ch_mult=multipliers,
        )
    ).to(device)
    model.quantize.codebook_used.requires_grad_(False)  # torch of today refuses its updates else
    settings = config["optimizer"]
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings["lr"], betas=tuple(settings["betas"])
    )
    images = torch.rand(batch, 3, *[encoder["image_size"]] * 2, device=device) * 2 - 1

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        pictures, (codes, commitment, entropy, _) = model(images)
        (F.mse_loss(pictures, images) + codes + commitment + entropy).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def encode() -> None:
        model.eval()
        model.encode(images)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    encode()
    parameters = sum(p.numel() for p in model.parameters())
    return {"step": step, "encode": encode}, {
        "flops": counter.get_total_flops(),
        "parameters": parameters,
    }
