"""The losses of the two players.

All compute in float32, whatever the logits come in: sums over thousands of patches and differences
of logits that are alike lose what matters in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of the means of max(0, 1 - real) and max(0, 1 + fake): a float32 scalar.

    Paper: Lim and Ye 2017, https://arxiv.org/abs/1705.02894; halved as in VQGAN.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Minus the mean logit of what was generated: a float32 scalar."""
    return -fake.float().mean()


def logistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of the means of softplus(-real) and softplus(fake), the cross-entropy.

    Paper: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661; halved as in VQGAN.
    """
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def saturation_free_generator_loss(fake: Tensor) -> Tensor:
    """The mean of softplus(-fake), minus the log-likelihood of being taken for real."""
    return F.softplus(-fake.float()).mean()


def saturation_free_loss_of_images(fake: Tensor) -> Tensor:
    """The mean over images of softplus of minus an image's mean logit.

    A patch that fools nobody pulls no harder than the others of its image.

    Papers: Open-MAGVIT2, Luo et al. 2024, https://arxiv.org/abs/2409.04410; IBQ, Shi et al. 2024,
    https://arxiv.org/abs/2412.02692.
    """
    return F.softplus(-fake.float().reshape(len(fake), -1).mean(1)).mean()


def least_squares_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of the means of (real - 1)^2 and fake^2.

    Paper: Mao et al. 2017, https://arxiv.org/abs/1611.04076.
    """
    return 0.5 * ((real.float() - 1).square().mean() + fake.float().square().mean())


def least_squares_generator_loss(fake: Tensor) -> Tensor:
    """Half the mean of (fake - 1)^2."""
    return 0.5 * (fake.float() - 1).square().mean()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """The mean of softplus(-(better - worse)), of an image and its reconstruction.

    Paper: Huang et al. 2025 (R3GAN), https://arxiv.org/abs/2501.05441. The discriminator's has the
    real image as the better one, the generator's the reconstruction.
    """
    return F.softplus(worse.float() - better.float()).mean()


class Game(NamedTuple):
    """The losses of both players.

    Attributes:
        discriminator: of the logits (real, fake).
        generator: of the logits (real, fake); it gets no gradient through the real ones.
        compares: whether the generator's depends on the real ones.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor | None, Tensor], Tensor]
    compares: bool = False


def _alone(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor | None, Tensor], Tensor]:
    return lambda real, fake: loss(fake)


def _relativistic_generator(real: Tensor | None, fake: Tensor) -> Tensor:
    assert real is not None, "compares"
    return relativistic_loss(fake, real.detach())


GAMES: dict[str, Game] = {
    "hinge": Game(hinge_discriminator_loss, _alone(hinge_generator_loss)),
    "vanilla": Game(logistic_discriminator_loss, _alone(hinge_generator_loss)),
    "non_saturating": Game(logistic_discriminator_loss, _alone(saturation_free_generator_loss)),
    "hinge_non_saturating": Game(hinge_discriminator_loss, _alone(saturation_free_generator_loss)),
    "hinge_non_saturating_mean": Game(
        hinge_discriminator_loss, _alone(saturation_free_loss_of_images)
    ),
    "least_squares": Game(least_squares_discriminator_loss, _alone(least_squares_generator_loss)),
    "relativistic": Game(relativistic_loss, _relativistic_generator, compares=True),
}


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """The squared norm of the gradient of an image's logits, averaged over images (R1, R2).

    Of a map of logits it is that of their sum. Both must be float32: the second derivative of bf16
    convolutions is noise.

    Paper: Mescheder et al. 2018, https://arxiv.org/abs/1801.04406.

    Args:
        logits: `(B, ...)` of `images`.
        images: `(B, C, H, W)`, with a gradient.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def lecam_penalty(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """How far logits lie beyond the moving means of the other side, squared.

    The mean of max(0, real - fake_mean)^2 plus that of max(0, real_mean - fake)^2.

    Paper: Tseng et al. 2021, https://arxiv.org/abs/2104.03310.

    Args:
        real: logits of real images, or their mean.
        fake: logits of reconstructions, or their mean.
        real_mean: moving mean of the logits of real images.
        fake_mean: moving mean of those of reconstructions.
    """
    over = F.relu(real.float() - fake_mean).square().mean()
    return over + F.relu(real_mean - fake.float()).square().mean()
