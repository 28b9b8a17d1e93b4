"""A light prior that learns along with a tokenizer, and tells it which ids are easy to predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.ranks import average_gradients
from vistok.core.registry import register
from vistok.core.values import Count, Decay, Index, NonNegative, filled_list
from vistok.models.term import MakeOptimizer, Player, Step
from vistok.models.tokenizer import Tokenizer
from vistok.nn.positions import grid_points
from vistok.priors.transformer import PriorTransformer, init_prior_, nll_of, turns


class LightPrior(nn.Module):
    """A causal transformer from code vectors to the ids of the next token.

    Args:
        sizes: number of codes of each stream.
        num_tokens: N.
        grid: rows and columns of the tokens; None for a line.
        dim: D, the width of the vectors.
        width: W.
        depth: number of blocks.
        num_heads: attention heads.
    """

    turn: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        num_tokens: int,
        grid: tuple[int, int] | None,
        dim: int,
        width: int,
        depth: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.start = nn.Embedding(1, width)
        self.embed = nn.Linear(dim, width, bias=False)
        self.transformer = PriorTransformer(width, depth, num_heads, 32, 0.0, False)
        self.head = nn.Linear(width, sum(sizes), bias=False)
        points = grid_points(grid) if grid else torch.arange(num_tokens)
        turn = turns(points, width // num_heads, 1, zero=True)[:-1]
        self.register_buffer("turn", turn, persistent=False)
        init_prior_(self)

    def forward(self, vectors: Tensor, ids: Tensor) -> Tensor:
        """Return the mean of minus the log-likelihood of an id, in nats.

        Args:
            vectors: `(B, N, D)` of the tokens, from which those behind are predicted.
            ids: `(B, N, Q)` to predict; -1 for none.
        """
        # Of unit size on average, or the tokenizer could make its codes easy by making them small.
        vectors = F.layer_norm(vectors, vectors.shape[-1:])
        start = self.start.weight.expand(len(vectors), 1, -1)
        x = torch.cat([start, self.embed(vectors[:, :-1])], dim=1)
        x = self.transformer.norm(self.transformer(x, self.turn, causal=True))
        parts = self.head(x).split(self.sizes, dim=-1)
        nll = torch.stack([nll_of(p, ids[..., q]) for q, p in enumerate(parts)], dim=-1)
        return nll.sum() / (ids >= 0).sum().clamp(min=1)


@register("prior_player")
class PriorPlayer(Player):
    """Predicts each token from those before it; the tokenizer is to make that easy.

    The idea is LARP's (Wang et al. 2024, https://arxiv.org/abs/2410.21264), on images and reduced:
    the prior reads the quantized vectors, which carry the straight-through gradient, and predicts
    ids. So the tokenizer's side moves latents such that what follows is more predictable; ids have
    no gradient. LARP's scheduled sampling and its stochastic quantizer are not here. For tokens
    that each stand for one latent, in the order in which a generator will draw them.

    Args:
        tokenizer: whose tokens.
        width: W of the prior.
        depth: number of blocks.
        num_heads: attention heads.
        lr: of its AdamW; warm-up and decay are the tokenizer's.
        betas: of its AdamW.
        weight_decay: of its AdamW.
        gradient_clip_val: largest norm of its gradient; None for no bound.
        warmup_samples: how long it learns before the tokenizer's loss reads it.
    """

    accepts = ()

    def __init__(
        self,
        tokenizer: Tokenizer,
        width: Count = 128,
        depth: Count = 2,
        num_heads: Count = 4,
        lr: NonNegative = 1e-3,
        betas: Annotated[
            Sequence[float], filled_list(Decay, "two numbers, 0 or more and below 1", (2,))
        ] = (0.9, 0.95),
        weight_decay: NonNegative = 0.0,
        gradient_clip_val: NonNegative | None = 1.0,
        warmup_samples: Index = 0,
    ) -> None:
        if not tokenizer.quantizer.per_token:
            raise ArgumentError(
                f"quantizer: {type(tokenizer.quantizer).__name__} has ids that stand for scales; "
                "a prior along with the tokenizer needs one token for each latent"
            )
        encoder = tokenizer.encoder
        grid = encoder.grid if encoder.grid is not None and len(encoder.grid) == 2 else None
        prior = LightPrior(
            tokenizer.quantizer.codebook_sizes,
            encoder.num_tokens,
            grid,  # type: ignore[arg-type]
            encoder.dim,
            width,
            depth,
            num_heads,
        )
        self.prior = prior.requires_grad_(False)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.clip = gradient_clip_val
        self.warmup_samples = warmup_samples
        self.optimizer: torch.optim.Optimizer | None = None
        self._kept: tuple[Tensor, Tensor] | None = None  # vectors and ids
        self._gathered = False

    def equip(self, make_optimizer: MakeOptimizer) -> None:
        """Take an optimizer of the prior's parameters."""
        self.prior.requires_grad_(True)
        self.optimizer = make_optimizer(self.prior, self.lr, self.betas, self.weight_decay)
        self.prior.requires_grad_(False)

    def __call__(self, step: Step) -> Tensor:
        """Return the loss of the batch's ids, through a prior that gets no gradient from it."""
        self.watch(step)
        output = step.output.quantizer
        return self.prior(output.quantized, output.indices)

    def watch(self, step: Step) -> None:
        """Keep vectors and ids."""
        output = step.output.quantizer
        self._kept = output.quantized.detach(), output.indices

    def learn(self, share: float, context: AbstractContextManager[Any]) -> dict[str, Tensor]:
        """Add the prior's gradients; its loss is logged as "prior_player"."""
        if self._kept is None:
            return {}
        (vectors, ids), self._kept = self._kept, None
        self.prior.requires_grad_(True)
        with context:
            loss = self.prior(vectors, ids)
        (loss * share).backward()
        self.prior.requires_grad_(False)
        return {"prior_player": loss.detach()}

    def gather(self) -> Tensor | None:
        """Average the gradients over the ranks and bound them; return their norm before."""
        parameters = list(self.prior.parameters())
        if all(p.grad is None for p in parameters):
            return None
        average_gradients(parameters)
        self._gathered = True
        return torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf"))

    def discard(self) -> None:
        """Forget the gradients and the batch."""
        self._kept, self._gathered = None, False
        for p in self.prior.parameters():
            p.grad = None

    def step(self, factor: float) -> None:
        """Move the prior."""
        assert self.optimizer is not None, "equip comes first"
        if not self._gathered and self.gather() is None:
            return
        self._gathered = False
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()

    def to(self, device: torch.device) -> None:
        """Move prior and moments."""
        self.prior.to(device)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # to where the weights are

    def state_dict(self) -> dict[str, Any]:
        """Return weights and moments."""
        assert self.optimizer is not None, "equip comes first"
        return {"prior": self.prior.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        assert self.optimizer is not None, "equip comes first"
        self.prior.load_state_dict(state["prior"])
        self.optimizer.load_state_dict(state["optimizer"])
