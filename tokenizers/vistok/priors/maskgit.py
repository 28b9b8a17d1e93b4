"""MaskGIT: ids in a few passes, the surest first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.sample_random import uniform
from vistok.core.signatures import check_values
from vistok.core.values import Count, Share
from vistok.nn.positions import grid_points
from vistok.priors.layout import Layout
from vistok.priors.prior import ConditionKind, Likelihood, Prior, Samples
from vistok.priors.sampling import Sampling, draw, guided, gumbel, random_numbers
from vistok.priors.transformer import PriorTransformer, dropped, init_prior_, nll_of, turns

#: Schedules of the share of tokens that are masked.
Schedule = Literal["cosine", "linear", "square", "cubic", "sqrt", "arccos"]


def masked_share(schedule: str, progress: Tensor) -> Tensor:
    """Return the share of tokens that are masked, from 1 at progress 0 down to 0 at progress 1."""
    curves = {
        "cosine": lambda r: torch.cos(r * (math.pi / 2)),
        "linear": lambda r: 1 - r,
        "square": lambda r: 1 - r**2,
        "cubic": lambda r: 1 - r**3,
        "sqrt": lambda r: 1 - r**0.5,
        "arccos": lambda r: torch.acos(r) / (math.pi / 2),
    }
    return curves[schedule](progress.double()).clamp(0, 1)


@register("maskgit_prior")
class MaskGITPrior(Prior):
    """Predicts masked ids from the others, by a transformer that sees all places.

    In training a share of the tokens that the schedule draws is masked, with all their streams, and
    the loss is that of the masked ids. An image is drawn in a few passes: each predicts all masked
    ids, draws them, keeps those that it is surest of and masks the others again, as many as the
    schedule says. The confidence is the log-probability of what was drawn, and Gumbel noise that
    fades to zero at the last pass.

    There is no likelihood in closed form. Out of training `likelihood` masks n tokens, chosen at
    random, and counts each N / n times: with n drawn evenly from 1 to N, an upper bound of minus
    the log-likelihood on average (Hoogeboom et al. 2021, https://arxiv.org/abs/2110.02037). The n
    of the images of a batch lie evenly over the range.

    Paper: MaskGIT, Chang et al. 2022, https://arxiv.org/abs/2202.04200. The transformer is the one
    of `GPT`, with learned places; images must have one length.

    Args:
        layout: how the ids of an image lie.
        width: W of the transformer.
        depth: number of blocks.
        num_heads: attention heads.
        condition: none, label or caption.
        condition_dropout: share of the images of which it is told nothing, for guidance.
        caption_bytes: the longest caption in bytes.
        schedule: cosine, linear, square, cubic, sqrt or arccos; in training and in sampling.
        label_smoothing: share of the probability that targets give to all ids, in training.
        multiple: the hidden width of the MLP, 8/3 of W, is rounded up to a multiple of it.
        token_dropout: of the input, in training.
        dropout: of what attention and MLP add, in training.
        activation_checkpointing: recompute each block in the backward pass.
    """

    turn: Tensor
    offsets: Tensor

    def __init__(
        self,
        layout: Layout,
        width: Count,
        depth: Count,
        num_heads: Count,
        condition: ConditionKind = "label",
        condition_dropout: Share = 0.1,
        caption_bytes: Count = 64,
        schedule: Schedule = "cosine",
        label_smoothing: Share = 0.1,
        multiple: Count = 256,
        token_dropout: Share = 0.1,
        dropout: Share = 0.1,
        activation_checkpointing: bool = False,
    ) -> None:
        check_values(MaskGITPrior, locals())
        super().__init__(layout, condition, condition_dropout, caption_bytes, width)
        if layout.variable:
            raise ArgumentError("layout: images have different lengths, which prior=gpt_tiny takes")
        self.schedule, self.label_smoothing = schedule, label_smoothing
        self.token_dropout = token_dropout
        sizes = layout.sizes
        self.starts = [sum(sizes[:stream]) for stream in range(len(sizes))]
        self.embed = nn.Embedding(sum(sizes) + 1, width)  # the last one stands for a masked token
        self.places = nn.Embedding(layout.num_tokens, width)
        self.transformer = PriorTransformer(
            width, depth, num_heads, multiple, dropout, activation_checkpointing
        )
        self.head = nn.Linear(width, sum(sizes), bias=False)
        points = grid_points(layout.grid) if layout.grid else torch.arange(layout.num_tokens)
        turn = turns(points, width // num_heads, self.told.length, zero=False)
        self.register_buffer("turn", turn, persistent=False)
        self.register_buffer("offsets", torch.tensor(self.starts), persistent=False)
        init_prior_(self)
        nn.init.zeros_(self.head.weight)

    def likelihood(self, ids: Tensor, lengths: Tensor | None, condition: Tensor) -> Likelihood:
        """Return the loss of a random part of the ids, or in eval a bound; see the class."""
        batch, count, _ = ids.shape
        numbers = uniform((batch, count + 1), ids.device)
        if self.training:
            share = masked_share(self.schedule, numbers[:, 0])
            chosen = (share * count).ceil().clamp(1, count)
        else:
            chosen = _evenly(numbers[:, 0], count)
        order = numbers[:, 1:].argsort(dim=1).argsort(dim=1)
        masked = order < chosen[:, None]
        logits = self.logits(ids, masked, condition)
        parts = []
        for stream, part in enumerate(logits):
            nll = nll_of(part, ids[..., stream])
            if self.training and self.label_smoothing:
                even = -F.log_softmax(part.float(), dim=-1).mean(dim=-1)
                nll = (1 - self.label_smoothing) * nll + self.label_smoothing * even
            parts.append(nll)
        nll = torch.stack(parts, dim=-1) * masked[..., None]
        if self.training:
            return Likelihood(nll, masked[..., None].expand_as(nll))
        nll = nll * (count / chosen.to(nll))[:, None, None]
        return Likelihood(nll, torch.ones_like(nll, dtype=torch.bool))

    def logits(self, ids: Tensor, masked: Tensor, condition: Tensor) -> list[Tensor]:
        """Return the logits of each stream, `(B, N, K)`.

        Args:
            ids: `(B, N, Q)`; those of masked tokens are not read.
            masked: `(B, N)` bool.
            condition: of the B images.
        """
        vectors = self.embed(ids + self.offsets).sum(dim=2)
        vectors = torch.where(masked[..., None], self.embed.weight[-1], vectors)
        front = self.told(condition)
        x = torch.cat([front, vectors + self.places.weight], dim=1)
        x = dropped(x, self.token_dropout, self.training)
        x = self.transformer(x, self.turn)[:, front.shape[1] :]
        return list(self.head(self.transformer.norm(x)).split(self.layout.sizes, dim=-1))

    @torch.no_grad()
    def stream(
        self, condition: Tensor, sampling: Sampling, first: int = 0, cached: bool = True
    ) -> Iterator[Samples]:
        """Draw images and yield them after every pass; all ids are there from the first one on.

        Args:
            condition: of B images.
            sampling: `steps` passes, and `noise`.
            first: number of the first image.
            cached: not read; every pass sees all places anew.
        """
        layout, device, batch = self.layout, self.device, len(condition)
        count, steps = layout.num_tokens, max(1, sampling.steps)
        condition = condition.to(device)
        if double := sampling.guidance != 1:
            condition = torch.cat([condition, self.told.unconditional(condition)])
        shape = (batch, steps, count, layout.num_streams + 1)
        numbers = random_numbers(sampling.seed, first, shape, device)
        ids = torch.zeros(batch, count, layout.num_streams, dtype=torch.long, device=device)
        masked = torch.ones(batch, count, dtype=torch.bool, device=device)
        lengths = torch.full((batch,), count, device=device)
        for step in range(1, steps + 1):
            given = [torch.cat([x, x]) if double else x for x in (ids, masked)]
            confidence = torch.zeros(batch, count, dtype=torch.float64, device=device)
            drawn = torch.empty_like(ids)
            for stream, logits in enumerate(self.logits(given[0], given[1], condition)):
                logits = guided(logits.float(), sampling.guidance)
                drawn[..., stream] = draw(logits, numbers[:, step - 1, :, stream], sampling)
                chances = F.log_softmax(logits, dim=-1)
                confidence += chances.gather(-1, drawn[..., stream, None]).squeeze(-1)
            ids = torch.where(masked[..., None], drawn, ids)
            progress = step / steps
            noise = gumbel(numbers[:, step - 1, :, -1]) * (sampling.noise * (1 - progress))
            confidence = (confidence + noise).masked_fill(~masked, float("inf"))
            masked = remask(confidence, self.schedule, progress)
            yield Samples(ids.clone(), lengths)


def remask(confidence: Tensor, schedule: str, progress: float) -> Tensor:
    """Return which tokens are masked again, `(B, N)` bool: the least sure ones.

    As many as the schedule says, but one fewer than were masked before, and at the end none.

    Args:
        confidence: `(B, N)`; infinite for those that are settled.
        schedule: see `masked_share`.
        progress: above 0, and 1 at the end.
    """
    count = confidence.shape[1]
    if progress >= 1:
        return torch.zeros_like(confidence, dtype=torch.bool)
    wanted = int(masked_share(schedule, torch.tensor(progress)) * count)
    open_ = torch.isfinite(confidence).sum(dim=1)
    many = (open_ - 1).clamp(min=1).clamp(max=max(1, wanted)).minimum(open_)
    order = confidence.argsort(dim=1, stable=True).argsort(dim=1)
    return (order < many[:, None]) & torch.isfinite(confidence)


def _evenly(numbers: Tensor, count: int) -> Tensor:
    """Draw n from 1 to `count` for each image, evenly over the batch."""
    places = torch.arange(len(numbers), device=numbers.device) + numbers
    return (places / len(numbers) * count).floor().long().clamp(max=count - 1) + 1
