"""A GPT over ids: LlamaGen's design, for any number of streams, lengths, scales and levels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.core.errors import ArgumentError
from vistok.core.registry import register
from vistok.core.signatures import check_values
from vistok.core.values import Count, Share, Sizes
from vistok.nn.positions import grid_points, level_points
from vistok.priors.layout import Layout, parents
from vistok.priors.prior import ConditionKind, Likelihood, Prior, Samples
from vistok.priors.sampling import Sampling, draw, guided, random_numbers
from vistok.priors.transformer import (
    Cache,
    PriorTransformer,
    dropped,
    init_prior_,
    nll_of,
    turns,
)

#: How the streams of a token are predicted.
Streams = Literal["heads", "chained", "flattened"]


@register("gpt")
class GPT(Prior):
    """Predicts ids from those before them, by a causal transformer.

    In front of the ids stands the condition. A token is predicted at the place of the one before
    it, or, where tokens come in blocks (scales, levels), a whole block at once: each token from the
    one of the block before that covers its part of the image, seeing all blocks before. For scales
    this is next-scale prediction (VAR, Tian et al. 2024, https://arxiv.org/abs/2404.02905) from
    embeddings of ids, so that it needs no tokenizer; for levels of one stream it is ResTok's.

    Of several streams (product, residual, factorised) "heads" predicts all of a token at once, each
    by a head of its own and independent of the others, "chained" one after the other in their
    order, where a head also sees the ids before it, and "flattened" makes tokens of them.

    Images of different lengths end with an id of their own, at the place of a token of the first
    stream; an image of N tokens just ends.

    The forward for one stream of a grid is LlamaGen's, Sun et al. 2024,
    https://arxiv.org/abs/2406.06525: RMSNorm, SwiGLU, 2D rotary positions, a condition whose
    queries and keys are zero. A caption is not zeroed: its bytes would be told apart by nothing.

    Args:
        layout: how the ids of an image lie.
        width: W of the transformer.
        depth: number of blocks.
        num_heads: attention heads.
        condition: none, label or caption.
        condition_dropout: share of the images of which it is told nothing, for guidance.
        caption_bytes: the longest caption in bytes.
        streams: heads, chained or flattened.
        predict: "tokens", one by one, or "blocks": the scales of the layout, or `levels`.
        levels: tokens of each level, coarse to fine, of a sequence that has no scales, such as
            [1, 1, 2, 4, 8] of ResTok; for predict="blocks".
        multiple: the hidden width of the MLP, 8/3 of W, is rounded up to a multiple of it.
        token_dropout: of the input, in training.
        dropout: of what attention and MLP add, in training.
        activation_checkpointing: recompute each block in the backward pass.
    """

    mask: Tensor | None
    turn: Tensor
    parent: Tensor
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
        streams: Streams = "heads",
        predict: Literal["tokens", "blocks"] = "tokens",
        levels: Sizes | None = None,
        multiple: Count = 256,
        token_dropout: Share = 0.1,
        dropout: Share = 0.1,
        activation_checkpointing: bool = False,
    ) -> None:
        check_values(GPT, locals())
        if levels is not None:
            if predict != "blocks" or sum(levels) != layout.num_tokens:
                raise ArgumentError(
                    f"levels={list(levels)}: must add up to the {layout.num_tokens} tokens of an "
                    "image, with predict=blocks"
                )
            blocks = tuple((1, count) for count in levels)
            layout = dataclasses.replace(layout, blocks=blocks, grid=None)
        super().__init__(layout, condition, condition_dropout, caption_bytes, width)
        if predict == "blocks":
            if not layout.blocks:
                raise ArgumentError(
                    "predict=blocks: the tokens have no scales; must be tokens, or give levels"
                )
            if layout.variable:
                raise ArgumentError("predict=blocks: images have different lengths; must be tokens")
            if streams == "flattened":
                raise ArgumentError("streams=flattened: cannot be combined with predict=blocks")
        self.streams, self.token_dropout = streams, token_dropout
        sizes = layout.sizes
        self.starts = [sum(sizes[:stream]) for stream in range(len(sizes))]
        #: Places of ids: tokens, or tokens times streams.
        self.per_place = len(sizes) if streams == "flattened" else 1
        self.num_places = layout.num_tokens * self.per_place
        self.embed = nn.Embedding(sum(sizes), width)
        self.transformer = PriorTransformer(
            width, depth, num_heads, multiple, dropout, activation_checkpointing
        )
        self.head = nn.Linear(width, sum(sizes) + layout.variable, bias=False)
        self.chain = nn.Embedding(sum(sizes), width) if streams == "chained" else None
        self.register_buffer("offsets", torch.tensor(self.starts), persistent=False)
        self._place(predict, width, width // num_heads)
        init_prior_(self)
        nn.init.zeros_(self.head.weight)

    def _place(self, predict: str, width: int, head_dim: int) -> None:
        """Lay out the places: what each is predicted from, what it sees, and where it lies."""
        layout, front = self.layout, self.told.length
        zero = self.told.kind != "caption"
        if predict == "blocks":
            self.counts = list(layout.counts)
            parent = parents(layout.blocks)
            points = level_points(list(layout.blocks), layout.blocks[-1])
            if all(rows == 1 for rows, _ in layout.blocks):
                points = points[:, 1]
            sizes = [1] * (front - 1) + self.counts
            level = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
            self.register_buffer("mask", level[:, None] >= level, persistent=False)
            turn = turns(points, head_dim, front - 1, zero)
            self.places = nn.Embedding(layout.num_tokens, width)
        else:
            self.counts = [1] * self.num_places
            parent = torch.arange(self.num_places) - 1
            points = grid_points(layout.grid) if layout.grid else torch.arange(layout.num_tokens)
            if layout.grid and self.per_place > 1:
                points = points.repeat_interleave(self.per_place, dim=0)
            elif self.per_place > 1:
                points = torch.arange(self.num_places)
            self.register_buffer("mask", None)
            # A place has the position of the token that it is predicted from.
            turn = turns(points, head_dim, front, zero)[:-1]
            self.places = None
        self.register_buffer("parent", parent, persistent=False)
        self.register_buffer("turn", turn, persistent=False)

    # ------------------------------------------------------------------ likelihood

    def likelihood(self, ids: Tensor, lengths: Tensor | None, condition: Tensor) -> Likelihood:
        """Return the likelihood of all ids; see `Prior.likelihood`."""
        count, streams = ids.shape[1:]
        targets = ids
        if self.layout.variable and lengths is not None:
            behind = torch.arange(count, device=ids.device) - lengths[:, None]
            targets = ids.masked_fill((behind >= 0)[..., None], -1)
            first = targets[..., 0].masked_fill(behind == 0, self.layout.sizes[0])
            targets = torch.cat([first[..., None], targets[..., 1:]], dim=-1)
            ids = ids.masked_fill((behind >= 0)[..., None], 0)
        hidden = self.hidden(ids, condition)
        rows = [
            nll_of(self.logits(self.seen_by(hidden, ids, stream), stream), targets[..., stream])
            for stream in range(streams)
        ]
        return Likelihood(torch.stack(rows, dim=-1), targets >= 0)

    def hidden(self, ids: Tensor, condition: Tensor) -> Tensor:
        """Return what the heads see, `(B, places, W)`, of ids `(B, N, Q)`, the last one unread."""
        front = self.told(condition)
        if self.places is None:
            x = torch.cat([front, self.embedded(ids, last=False)], dim=1)
        else:
            x = torch.cat([front, self.embedded(ids)], dim=1)
            inputs = self._in_places(x, front.shape[1], slice(None))
            x = torch.cat([front[:, :-1], inputs], dim=1)
        x = dropped(x, self.token_dropout, self.training)
        x = self.transformer(x, self.turn, self.mask, causal=self.mask is None)
        return x[:, front.shape[1] - 1 :] if front.shape[1] > 1 else x

    def embedded(self, ids: Tensor, last: bool = True) -> Tensor:
        """Embed ids `(B, n, Q)`: `(B, n, W)`, or `(B, n * Q, W)` of flattened ones.

        Args:
            ids: of the streams.
            last: with the last place, which in training nothing is predicted from.
        """
        ids = ids + self.offsets
        if self.per_place > 1:
            ids = ids.flatten(1)
            return self.embed(ids if last else ids[:, :-1])
        ids = ids if last else ids[:, :-1]
        if ids.shape[2] == 1:
            return self.embed(ids.squeeze(2))
        return self.embed(ids).sum(dim=2)

    def _in_places(self, x: Tensor, front: int, places: slice) -> Tensor:
        """Gather the inputs of some places of blocks from `[condition | embeddings]`."""
        assert self.places is not None
        return x[:, self.parent[places] + front] + self.places.weight[places]

    def seen_by(self, hidden: Tensor, ids: Tensor, stream: int) -> Tensor:
        """Return what the head of a stream sees, `(B, N, W)`.

        Args:
            hidden: `(B, places, W)`.
            ids: `(B, N, Q)`, of which a chained head reads the streams before its own.
            stream: number of the stream.
        """
        if self.per_place > 1:
            hidden = hidden[:, stream :: self.per_place]
        if self.chain is not None and stream:
            before = ids[..., :stream] + self.offsets[:stream]
            hidden = hidden + self.chain(before).sum(dim=2)
        return self.transformer.norm(hidden)

    def logits(self, seen: Tensor, stream: int) -> Tensor:
        """Return the logits of a stream, `(..., K)`; K + 1 where an image may end."""
        start, size = self.starts[stream], self.layout.sizes[stream]
        if len(self.layout.sizes) == 1:
            return self.head(seen)
        logits = F.linear(seen, self.head.weight[start : start + size])
        if stream == 0 and self.layout.variable:
            logits = torch.cat([logits, F.linear(seen, self.head.weight[-1:])], dim=-1)
        return logits

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def stream(
        self, condition: Tensor, sampling: Sampling, first: int = 0, cached: bool = True
    ) -> Iterator[Samples]:
        """Draw images and yield them after every token or block; see `Prior.stream`."""
        run = _Run(self, condition, sampling, first, cached)
        while not run.done:
            yield run.step()


@dataclass
class _Run:
    """Images under way: what was drawn, and what is kept for the next step."""

    prior: GPT
    condition: Tensor
    sampling: Sampling
    first: int
    cached: bool

    def __post_init__(self) -> None:
        prior, batch = self.prior, len(self.condition)
        layout, device = prior.layout, prior.device
        condition = self.condition.to(device)
        if self.sampling.guidance != 1:
            condition = torch.cat([condition, prior.told.unconditional(condition)])
        self.front = prior.told(condition)  # of the doubled batch
        shape = (batch, layout.num_tokens, layout.num_streams)
        self.numbers = random_numbers(self.sampling.seed, self.first, shape, device)
        self.ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.lengths = torch.full((batch,), layout.num_tokens, device=device)
        self.running = torch.ones(batch, dtype=torch.bool, device=device)
        self.tokens = self.place = self.number = 0
        self.caches: list[Cache] | None = None
        if self.cached:
            length = self.front.shape[1] - 1 + prior.num_places
            self.caches = prior.transformer.caches(len(self.front), length, self.front)

    @property
    def done(self) -> bool:
        """Return whether all images are whole."""
        whole = self.tokens == self.prior.layout.num_tokens
        return whole or (self.prior.layout.variable and not self.running.any())

    def step(self) -> Samples:
        """Draw one more token or block."""
        prior = self.prior
        count = 1 if prior.per_place > 1 else prior.counts[self.number]
        span = slice(self.tokens, self.tokens + count)
        hidden = None
        for stream in range(prior.layout.num_streams):
            if hidden is None or prior.per_place > 1:
                hidden = self._hidden(prior.counts[self.number])
            seen = hidden
            if prior.chain is not None and stream:
                before = self._doubled(self.ids[:, span, :stream]) + prior.offsets[:stream]
                seen = seen + prior.chain(before).sum(dim=2)
            logits = prior.logits(prior.transformer.norm(seen), stream).float()
            logits = guided(logits, self.sampling.guidance)
            drawn = draw(logits, self.numbers[:, span, stream], self.sampling)
            self._take(drawn, span, stream)
        self.tokens += count
        self.ids[:, span] *= self.running[:, None, None]
        found = self.lengths.clamp(max=self.tokens)
        return Samples(self.ids[:, : self.tokens].clone(), found)

    def _take(self, drawn: Tensor, span: slice, stream: int) -> None:
        if stream == 0 and self.prior.layout.variable:
            ends = (drawn[:, 0] == self.prior.layout.sizes[0]) & self.running
            self.lengths = self.lengths.masked_fill(ends, self.tokens)
            self.running = self.running & ~ends
            drawn = drawn.clamp(max=self.prior.layout.sizes[0] - 1)
        self.ids[:, span, stream] = drawn

    def _doubled(self, ids: Tensor) -> Tensor:
        return torch.cat([ids, ids]) if self.sampling.guidance != 1 else ids

    def _hidden(self, count: int) -> Tensor:
        """Run the next `count` places; `(B, count, W)` for the heads."""
        prior, front = self.prior, self.front.shape[1]
        places = slice(self.place, self.place + count)
        if self.caches is None:
            hidden = self._anew(places)
        else:
            if not self.place and front > 1:  # the condition, but for its last vector
                x = self.front[:, :-1]
                prior.transformer(x, prior.turn[: front - 1], causal=True, caches=self.caches)
            x = self._inputs(places)
            turn = prior.turn[front - 1 + places.start : front - 1 + places.stop]
            hidden = prior.transformer(x, turn, caches=self.caches)
        self.place, self.number = places.stop, self.number + 1
        return hidden

    def _inputs(self, places: slice) -> Tensor:
        """Return the inputs of some places, all of which follow from what was drawn."""
        prior, front = self.prior, self.front.shape[1]
        if prior.places is not None:
            known = prior.embedded(self._doubled(self.ids[:, : self.tokens]))
            return prior._in_places(torch.cat([self.front, known], dim=1), front, places)
        if not places.start:
            return self.front[:, -1:]
        token, stream = divmod(places.start - 1, prior.per_place)
        if prior.per_place == 1:
            return prior.embedded(self._doubled(self.ids[:, token : token + 1]))
        ids = self._doubled(self.ids[:, token, stream]) + prior.starts[stream]
        return prior.embed(ids)[:, None]

    def _anew(self, places: slice) -> Tensor:
        """Run everything up to the end of some places again, as without a cache."""
        prior, front = self.prior, self.front.shape[1]
        end = front - 1 + places.stop
        if prior.places is None:
            x = torch.cat([self.front, prior.embedded(self._doubled(self.ids))], dim=1)[:, :end]
        else:
            x = torch.cat([self.front[:, :-1], self._inputs(slice(0, places.stop))], dim=1)
        mask = None if prior.mask is None else prior.mask[:end, :end]
        x = prior.transformer(x, prior.turn[:end], mask, causal=mask is None)
        return x[:, -(places.stop - places.start) :]
