"""Vector quantization by logits of a linear layer and Gumbel-softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.sample_random import uniform
from vistok.core.signatures import check_values
from vistok.core.values import CodebookSize, Count, Index, NonNegative, Positive
from vistok.quantizers.base import Quantizer, token_mean
from vistok.quantizers.kmeans import kmeans

#: How much a start by k-means prefers the nearest code, in units of the mean squared distance.
_CONFIDENCE = 10.0


@register("gumbel")
class GumbelLogits(Quantizer):
    """Picks codes by the logits of a linear layer; codes and logits are learned apart.

        l = W z + b    p = softmax((l + g) / T)    i = argmax p    ẑ = (onehot(i) + p − sg p)·E

    with Gumbel noise g in training alone. The loss "prior" is KL(softmax(l) | uniform), summed over
    codes, in nats. In contrast to `vq` with assignment=gumbel, no distance picks the code. Needs
    memory for a few N×K matrices in training; evaluation has one.

    Papers: Gumbel-softmax, https://arxiv.org/abs/1611.01144; DALL-E, https://arxiv.org/abs/2102.12092;
    VQGAN's Gumbel variant, https://arxiv.org/abs/2012.09841.

    Args:
        dim: width D of the latents and of the codes.
        codebook_size: number of codes K.
        temperature: T at the first step.
        final_temperature: T after `anneal_steps`; None for no annealing.
        anneal_steps: optimizer steps of the annealing, which is exponential.
        prior_weight: weight of the loss "prior", 5e-4 in VQGAN.
        kmeans_init: start codes and logits by k-means on the latents given to `initialize`, so that
            the likeliest code is the nearest; else both start as they are drawn, as in VQGAN.
        kmeans_iterations: rounds of k-means.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: CodebookSize,
        *,
        temperature: Positive = 1.0,
        final_temperature: Positive | None = None,
        anneal_steps: Index = 0,
        prior_weight: NonNegative = 5e-4,
        kmeans_init: bool = False,
        kmeans_iterations: Count = 10,
    ) -> None:
        check_values(GumbelLogits, locals())
        super().__init__(dim, None, [codebook_size], {"prior": prior_weight})
        self.logits = nn.Linear(dim, int(codebook_size))
        self.embedding = nn.Parameter(torch.randn(int(codebook_size), dim))
        self.temperature = temperature
        self.final_temperature = temperature if final_temperature is None else final_temperature
        self.anneal_steps = anneal_steps
        self.kmeans_init = kmeans_init
        self.kmeans_iterations = kmeans_iterations
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def current_temperature(self) -> Tensor:
        """Return T of the current step, a scalar tensor."""
        done = (self.steps / max(self.anneal_steps, 1)).clamp(max=1)
        return self.temperature * (self.final_temperature / self.temperature) ** done

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        logits, temperature = self.logits(codes), self.current_temperature()
        noise = uniform(logits.shape, logits.device).clamp(min=1e-9)
        noisy = (logits - torch.log(-torch.log(noise))) / temperature
        p = torch.softmax(noisy, dim=-1)
        ids = noisy.argmax(dim=-1)
        soft = p @ self.embedding.detach()
        quantized = F.embedding(ids, self.embedding) + (soft - soft.detach())
        log_q = torch.log_softmax(logits, dim=-1)
        divergence = (log_q.exp() * (log_q + logits.new_tensor(logits.shape[-1]).log())).sum(-1)
        losses = {"prior": token_mean(divergence, mask)}
        return QuantizerOutput(quantized, ids[..., None], losses, {"temperature": temperature})

    @torch.no_grad()
    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        return self.logits(codes).argmax(dim=-1, keepdim=True)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        return F.embedding(indices.squeeze(-1), self.embedding)

    @property
    def num_init_latents(self) -> int:
        """Return four latents per code if the codes start by k-means."""
        return 4 * self.codebook_sizes[0] if self.kmeans_init else 0

    @torch.no_grad()
    def initialize(self, latents: Tensor) -> None:
        """Set codes and logits by k-means on `latents` `(M, D)`.

        Up to a term that all codes share, the logits are −s |z − E|², with s the confidence over
        the mean squared distance to the nearest code, of the latents that are not codes.
        """
        if not self.kmeans_init or latents.shape[0] == 0:
            return
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float()
            codes, _ = kmeans(z, len(self.embedding), self.kmeans_iterations, False)
            self.embedding.copy_(codes)
            self.logits.weight.copy_(2 * codes)
            self.logits.bias.copy_(-codes.square().sum(dim=1))
            nearest = codes[self.logits(z).argmax(dim=1)]
            # K of the latents fit their codes exactly. Few latents fit too well: logits that say
            # so leave no gradient.
            error = (z - nearest).square().sum() / max(1, len(z) - len(codes))
            least = 0.1 * (z - z.mean(dim=0)).square().sum(dim=1).mean()
            scale = _CONFIDENCE / torch.maximum(error, least).clamp(min=1e-6)
            self.logits.weight.mul_(scale)
            self.logits.bias.mul_(scale)

    @property
    def against_collapse(self) -> str:
        """Return that a start from data and the prior term spread the use of codes."""
        advice = "a higher quantizer.prior_weight, quantizer.temperature, or a lower optimizer.lr"
        return advice if self.kmeans_init else f"quantizer.kmeans_init=true, {advice}"

    def codebooks(self) -> list[Tensor]:
        """The table `(K, d)`."""
        return [self.embedding.detach()]

    def after_step(self, optimizers: object = ()) -> dict[str, Tensor]:
        """Count the optimizer step for the annealing."""
        self.steps += 1
        return {}
