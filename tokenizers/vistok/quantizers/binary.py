"""Binary latents: Bernoulli bits in training, and a learned linear map of the bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vistok.core.geometry import Grid
from vistok.core.outputs import QuantizerOutput
from vistok.core.registry import register
from vistok.core.sample_random import uniform
from vistok.core.signatures import check_values
from vistok.core.values import CodebookSize, Count, Index, NonNegative, Positive
from vistok.quantizers.base import Quantizer, token_mean
from vistok.quantizers.scalar import (
    binary_radices,
    bits_of,
    pack_digits,
    straight_through,
    unpack_digits,
)


@register("binary")
class BinaryLatents(Quantizer):
    """Binary latents: each of d logits is one bit, a token is the sum of the vectors of its 1s.

    Training samples b ~ Bernoulli(sigmoid(logit / T)), with the straight-through gradient of
    sigmoid(logit) (without T, as in Instella). Evaluation takes b = logit > 0. The decoder sees
    b M with a learned M `(d, D)`, for any D, also when D = d.

    The loss "binarization" is the mean variance p (1 - p) of p = sigmoid(logit), 0 to 0.25; it
    makes the bits certain, so that sampling and evaluation agree.

    The temperature goes from `temperature` to `final_temperature` linearly over `anneal_steps`
    optimizer steps (calls of `after_step`; the count is part of the saved state).

    Indices are least significant bit first (BAE's released ids are the other way round).

    Papers: BAE, https://arxiv.org/abs/2410.16257 (T = 1, no loss; departures: sampling ends with
    training mode instead of by a flag, and p (1 - p) is of p itself, not of sigmoid(p)).
    Instella-T2I, https://arxiv.org/abs/2506.21022 (64 bits, T = 0.1, weight 0.01).

    Args:
        dim: width D of the latents.
        codebook_size: codes of one index slot, a power of two up to 2^18.
        num_codebooks: index slots Q; the token has d = Q * log2(codebook_size) bits.
        temperature: T at the first step.
        final_temperature: T after `anneal_steps`; None for no annealing.
        anneal_steps: length of the annealing in optimizer steps.
        binarization_weight: weight of the loss "binarization".

    Raises:
        ConfigError: if a value is out of range; the message names its key.
    """

    whiten_projection = True

    def __init__(
        self,
        dim: Count,
        codebook_size: CodebookSize = 2**16,
        num_codebooks: Count = 1,
        temperature: Positive = 1.0,
        final_temperature: Positive | None = None,
        anneal_steps: Index = 0,
        binarization_weight: NonNegative = 0.0,
    ) -> None:
        check_values(BinaryLatents, locals())
        final = temperature if final_temperature is None else final_temperature
        bits = bits_of(codebook_size)
        super().__init__(
            dim,
            bits * num_codebooks,
            [codebook_size] * num_codebooks,
            {"binarization": binarization_weight},
        )
        self.bits = bits
        self.project_out = nn.Linear(self.codebook_dim, dim, bias=False)
        self.temperature = temperature
        self.final_temperature = final
        self.anneal_steps = anneal_steps
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def _quantize(self, codes: Tensor, mask: Tensor | None, grid: Grid | None) -> QuantizerOutput:
        temperature = self.current_temperature()
        odds = torch.sigmoid(codes.detach() / temperature)
        sample = (uniform(codes.shape, codes.device) < odds).to(codes.dtype)
        p = torch.sigmoid(codes)
        losses = {"binarization": token_mean((p * (1 - p)).mean(-1), mask)}
        metrics = {"temperature": temperature}
        return QuantizerOutput(straight_through(p, sample), self._pack(sample), losses, metrics)

    def _search(self, codes: Tensor, grid: Grid | None = None) -> Tensor:
        return self._pack(codes > 0)

    def _lookup(self, indices: Tensor, grid: Grid | None = None) -> Tensor:
        radices = binary_radices(self.bits, indices.device)
        return unpack_digits(indices, radices).flatten(-2).float()

    def _pack(self, bits: Tensor) -> Tensor:
        digits = bits.unflatten(-1, (self.num_indices, self.bits))
        return pack_digits(digits, binary_radices(self.bits, bits.device))

    def digits(self) -> list[list[float]]:
        """Return 0 and 1 for each bit."""
        return [[0.0, 1.0]] * self.bits

    def codebooks(self) -> list[Tensor]:
        """The same table `(2^bits, bits)` of 0s and 1s for each slot."""
        ids = torch.arange(self.codebook_sizes[0], device=self.steps.device)
        table = unpack_digits(ids, binary_radices(self.bits, ids.device)).float()
        return [table] * self.num_indices

    def current_temperature(self) -> Tensor:
        """T of the current step, a scalar tensor (the step count is never read by the host)."""
        done = (self.steps / max(self.anneal_steps, 1)).clamp(max=1)
        return self.temperature + (self.final_temperature - self.temperature) * done

    def after_step(self, optimizers: object = ()) -> dict[str, Tensor]:
        """Count the optimizer step for the annealing."""
        self.steps += 1
        return {}
