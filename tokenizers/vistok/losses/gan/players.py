"""The losses of the two players."""

from __future__ import annotations

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
