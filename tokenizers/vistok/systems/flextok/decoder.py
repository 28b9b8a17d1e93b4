"""A decoder that samples: rectified flow from noise to an image, led by tokens (FlexTok's)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vistok.core.errors import ArgumentError, ConfigError
from vistok.core.geometry import as_pair, grid_of
from vistok.core.outputs import Prediction
from vistok.core.registry import register
from vistok.core.sample_random import normal, uniform
from vistok.core.signatures import check_values
from vistok.core.taps import NO_TAPS, Tap, Taps
from vistok.core.values import (
    Count,
    ImageSize,
    NonNegative,
    Share,
    check,
    whole,
)
from vistok.models.decoder import Decoder
from vistok.nn.blocks import ModulatedBlock, attend_by_position_, init_transformer_
from vistok.nn.data_init import chunks, least_squares
from vistok.nn.flow import Guidance, integrate, mix, time_features
from vistok.nn.patches import patchify, unpatchify
from vistok.nn.positions import grid_points, position_table, spread_points


@register("flow_decoder")
class FlowDecoder(Decoder):
    """Predicts the velocity of a noisy image from the tokens; sampling walks from noise.

    Sequence `[patches of the noisy image | registers]` with full attention and AdaLN-Zero on the
    time, modulating patches and registers apart. Registers that are missing (masked or behind
    the end) become one learned vector, after projection and positions; in training all of an
    image's registers become another one now and then, which gives the unconditional branch of
    guidance. In FlexTok the flow runs in the latents of an autoencoder; here it runs in what it is
    given, pixels or latents.

    The forward is the released one; positions of patches are learned. The start differs: the
    paper's gates and head are all zero. Here those of the first attention are open, positions
    start as sines and cosines, and `initialize`, which a run with `init=random` leaves out, fits
    the head.

    Paper: FlexTok, Bachmann et al. 2025, https://arxiv.org/abs/2502.13967.

    Args:
        image_size: side in pixels, or (H, W), multiples of `patch_size`.
        channels: C.
        patch_size: side of a patch in pixels.
        num_latent_tokens: N, the longest code.
        latent_dim: D, the width of the quantized latents.
        width: W of the transformer, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        predicts: what the head says, "velocity" (the paper) or "image", from which the velocity
            follows. Velocities hold noise in every pixel, which a patch of more pixels than W
            can't carry; images don't (Li and He 2025, https://arxiv.org/abs/2511.13720).
        null_probability: of dropping all of an image's registers in a training step; without it
            there is no guidance.
        steps: Euler steps of sampling, unless given.
        guidance: scale of sampling, unless given; 1 for none, which halves the cost.
        seed: of the noise, unless given.
        apg: guide by adaptive projected guidance; see `Guidance`.
        activation_checkpointing: see `Transformer`.
        nested: as in the encoder.
        time_dim: number of the time's features, even.
        slowest_time: lowest of their frequencies; see `time_features`. With 256 features 4.0792
            makes the highest turn by 1000 radians from data to noise.

    Raises:
        ConfigError: here and in `reconstruct`, for numbers that no sampling can take.
    """

    sampling = ("steps", "guidance", "seed")

    def __init__(
        self,
        image_size: ImageSize,
        channels: Count,
        patch_size: Count,
        num_latent_tokens: Count,
        latent_dim: Count,
        width: Count,
        depth: Count,
        num_heads: Count,
        predicts: Literal["velocity", "image"] = "velocity",
        null_probability: Share = 0.1,
        steps: Count = 25,
        guidance: NonNegative = 7.5,
        seed: int = 0,
        apg: bool = True,
        activation_checkpointing: bool = False,
        nested: bool = False,
        time_dim: Annotated[int, whole(2)] = 256,
        slowest_time: NonNegative = 4.0792,
    ) -> None:
        super().__init__()
        check_values(FlowDecoder, locals())
        self.shape = (channels, *as_pair(image_size))
        self.grid = grid_of(image_size, patch_size)
        self.patch_size = patch_size
        self.dim = latent_dim
        self.num_tokens = num_latent_tokens
        self.predicts = predicts
        self.null_probability = null_probability
        self._check_sampling(steps, guidance)
        if time_dim % 2:
            raise ArgumentError(f"time_dim={time_dim}: must be even, for sines and cosines")
        self.steps, self.guidance, self.seed, self.apg = steps, guidance, seed, apg
        self.activation_checkpointing = activation_checkpointing
        pixels = patch_size * patch_size * channels
        self.patch_embed = nn.Linear(pixels, width)
        self.embed = nn.Linear(latent_dim, width)
        self.time_dim, self.slowest_time = time_dim, slowest_time
        self.time_embed = nn.Sequential(
            nn.Linear(self.time_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(ModulatedBlock(width, num_heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate_out = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, pixels)
        init_transformer_(self)
        head = width // num_heads
        attend_by_position_(self.blocks[0].attn, head)  # type: ignore[arg-type]
        zeros: list[nn.Module] = [self.modulate_out, self.head]
        zeros += [layer for name, layer in self.named_modules() if "modulations." in name]
        for parameter in (p for layer in zeros for p in layer.parameters()):
            nn.init.zeros_(parameter)
        # But the first attention is open, so that the registers reach the patches at once. With
        # all gates shut the encoder would get gradients of pure chance, which Adam makes as large
        # as any, and its latents would be at the ends of FSQ's range before they mean anything.
        for modulation in self.blocks[0].modulations:  # type: ignore[union-attr]
            nn.init.ones_(modulation.bias[:width])
        nn.init.orthogonal_(self.embed.weight)
        points = grid_points(self.grid)
        self.patch_positions = nn.Parameter(position_table(points, width, head, self.grid))
        points = spread_points(num_latent_tokens, self.grid, nested)
        self.register_positions = nn.Parameter(position_table(points, width, head, self.grid))
        self.dropped = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.null = nn.Parameter(torch.randn(1, 1, width) * 0.02, null_probability > 0)

    # ------------------------------------------------------------------ training

    @property
    def heads(self) -> dict[str, str]:
        """The image at a random time of its path, or the velocity there; see `predicts`."""
        return {"image": "pixels" if self.predicts == "image" else "velocity"}

    def forward(  # type: ignore[override]
        self, quantized: Tensor, images: Tensor, mask: Tensor | None = None, taps: Taps = NO_TAPS
    ) -> dict[str, Prediction]:
        """Predict the velocity, noise - image, or the image at a random time of each path."""
        registers = self.registers(quantized, mask)
        if self.training and self.null_probability:
            drop = uniform((len(images), 1, 1), images.device) < self.null_probability
            registers = torch.where(drop, self.null.to(registers.dtype), registers)
        time = torch.sigmoid(normal((len(images),), images.device))
        noise = normal(images.shape, images.device).to(images.dtype)
        output = self.output(mix(images, noise, time), time, registers, taps)
        target = images if self.predicts == "image" else noise - images
        return {"image": Prediction(output, target, self.heads["image"])}

    def tap_shapes(self) -> dict[str, Tap]:
        """Return those of the blocks; sampling offers them at each step, with the registers."""
        tap = Tap(self.embed.out_features, self.grid)
        return {f"block.{number}": tap for number in range(len(self.blocks))}

    def registers(self, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
        """Registers `(B, N, W)` of the first n <= N tokens `(B, n, D)`; missing ones dropped."""
        batch, length, _ = quantized.shape
        x = self.embed(quantized) + self.register_positions[:length]
        dropped = self.dropped.to(x.dtype)
        if mask is None and self.training:  # DDP wants every parameter in every step's graph
            mask = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        if mask is not None:
            x = torch.where(mask[..., None], x, dropped)
        if length < self.num_tokens:
            x = torch.cat([x, dropped.expand(batch, self.num_tokens - length, -1)], dim=1)
        return x

    def output(
        self, noisy: Tensor, time: Tensor, registers: Tensor, taps: Taps = NO_TAPS
    ) -> Tensor:
        """Return what the head says, `(B, C, H, W)`, of images `(B, C, H, W)` at times `(B,)`."""
        patches = self.head(self.features(noisy, time, registers, taps))
        return unpatchify(patches, self.grid, self.patch_size)

    def velocity(
        self, noisy: Tensor, time: Tensor, registers: Tensor, taps: Taps = NO_TAPS
    ) -> Tensor:
        """Velocity `(B, C, H, W)` at images `(B, C, H, W)` and times `(B,)` in (0, 1]."""
        output = self.output(noisy, time, registers, taps)
        if self.predicts == "velocity":
            return output
        # However close to the data: an Euler step is never longer than its time, so an error of
        # the image stays as large as it is, and the last step lands on the image itself.
        return (noisy - output.float()) / time.view(-1, 1, 1, 1)

    def features(
        self, noisy: Tensor, time: Tensor, registers: Tensor, taps: Taps = NO_TAPS
    ) -> Tensor:
        """Return what the head sees: `(B, rows * columns, W)`, raster order."""
        dtype = self.patch_embed.weight.dtype
        # The walk is float32, also where the weights are not.
        patches = self.patch_embed(patchify(noisy.to(dtype), self.patch_size))
        patches = patches + self.patch_positions
        count = patches.shape[1]
        times = time_features(time, self.time_dim, self.slowest_time)
        condition = self.time_embed(times.to(dtype))
        x = torch.cat([patches.to(registers.dtype), registers], dim=1)
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, condition, count, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, condition, count)
            taps.offer(f"block.{number}", self._patches_of(x))
        shift, scale = self.modulate_out(nn.functional.silu(condition))[:, None].chunk(2, dim=-1)
        return self.norm_out(self._patches_of(x)) * (1 + scale) + shift

    def _patches_of(self, sequence: Tensor) -> Tensor:
        """The patches `(B, rows * columns, W)` in the sequence behind any block."""
        return sequence[:, : self.patch_positions.shape[0]]

    @torch.no_grad()
    def initialize(self, quantized: Tensor, images: Tensor) -> None:
        """Start the head at the linear map to what it predicts; the paper starts it at zero."""
        generator = torch.Generator().manual_seed(0)
        time = torch.sigmoid(torch.randn(len(images), generator=generator)).to(images.device)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        rows = []
        for n, q, t in chunks(mix(images, noise, time), quantized, time):
            rows.append(self.features(n, t, self.registers(q)).float())
        target = images if self.predicts == "image" else noise - images
        target = patchify(target, self.patch_size)
        weight, bias = least_squares(torch.cat(rows).flatten(0, 1), target.flatten(0, 1))
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    # ------------------------------------------------------------------ sampling

    def reconstruct(
        self,
        quantized: Tensor,
        mask: Tensor | None = None,
        taps: Taps = NO_TAPS,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Tensor | None = None,
    ) -> Tensor:
        """Sample images `(B, C, H, W)` from the first n <= N tokens, `(B, n, D)`.

        Args:
            quantized: vectors of the tokens.
            mask: `(B, n)` bool; tokens marked False count as dropped.
            taps: offered the patches of each step, so that those of the last one stay.
            steps: Euler steps; 1 gives what the network expects on average, best by PSNR.
            guidance: 1 for none.
            seed: of the noise. One number gives every image the same noise, so that an image
                does not depend on its neighbours in the batch; `(B,)` seeds give each its own.
        """
        steps = self.steps if steps is None else steps
        guidance = self.guidance if guidance is None else guidance
        self._check_sampling(steps, guidance)
        registers = self.registers(quantized, mask)
        null = self.null.to(registers.dtype).expand_as(registers)
        guide = Guidance(guidance, self.apg)

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            v = self.velocity(x, time, registers, taps).float()
            if guidance == 1:
                return v
            return guide(v, self.velocity(x, time, null).float())

        noise = self.noise(len(quantized), self.seed if seed is None else seed)
        return integrate(velocity, noise.to(quantized.device), steps)

    def check_sampling(  # type: ignore[override]
        self,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | Tensor | None = None,
    ) -> None:
        """Refuse what `reconstruct` would refuse, but for the number of seeds."""
        self._check_sampling(
            self.steps if steps is None else steps,
            self.guidance if guidance is None else guidance,
        )
        self._seeds(self.seed if seed is None else seed)

    def noise(self, batch: int, seed: int | Tensor) -> Tensor:
        """Noise `(B, C, H, W)`, drawn on the CPU so that every device gets the same."""
        seeds = self._seeds(seed)
        if len(seeds) not in (1, batch):
            raise ConfigError(f"seed: expected one number or {batch}, found {len(seeds)}")
        draws = [torch.randn(self.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        noise = torch.stack(draws) if draws else torch.empty(0, *self.shape)
        return noise.expand(batch, *self.shape)

    def _seeds(self, seed: Any) -> list[int]:
        """One or several, as a list."""
        try:
            seeds: list[Any] = torch.as_tensor(seed).reshape(-1).tolist()
        except (TypeError, ValueError, RuntimeError):  # a word, a number beyond 64 bits
            seeds = [seed]
        for s in seeds:
            check("seed", s, int)
        return seeds

    def _check_sampling(self, steps: Any, guidance: Any) -> None:
        check_values(FlowDecoder, {"steps": steps, "guidance": guidance})
        if guidance != 1 and not self.null_probability:
            raise ArgumentError(
                f"guidance={guidance}: needs an unconditional branch, which null_probability=0 "
                "does not train; use guidance=1"
            )

    @property
    def last_layer(self) -> Tensor:
        """Weight of the head."""
        return self.head.weight
