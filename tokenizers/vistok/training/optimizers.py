"""AdamW with the right parameters decayed, and a schedule that counts samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vistok.core.errors import ConfigError, nearest
from vistok.core.ranks import all_reduce_sum

# Only these modules' `weight` is decayed: norms, biases, positions, tokens and codebooks are not.
_DECAYED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups that hold each trainable parameter once: decayed and not decayed.

    Of parameters that are sharded (FSDP2) these are further groups: an optimizer computes with all
    tensors of a group at once, which must be of one kind.
    """
    decayed_ids = {id(m.weight) for m in module.modules() if isinstance(m, _DECAYED)}
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if id(p) in decayed_ids]
    others = [p for p in trainable if id(p) not in decayed_ids]
    groups = [
        {"params": [p for p in params if isinstance(p, DTensor) is sharded], "weight_decay": decay}
        for params, decay in ((decayed, weight_decay), (others, 0.0))
        for sharded in (False, True)
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of `module`."""
    groups = parameter_groups(module, weight_decay)
    if not groups:
        raise ConfigError("optimizer: the tokenizer has no trainable parameter")
    for group in groups:
        group["fused"] = _fused(group["params"])
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]))
    optimizer.register_load_state_dict_pre_hook(_fused_here)
    return optimizer


def _fused(parameters: list[nn.Parameter]) -> bool | None:
    """Return whether AdamW makes one pass over memory, four times as fast on a CPU.

    On a GPU torch's choice, None, which is as fast; a fused step would leave the gradients of fp16
    scaled until then, too late for clipping.
    """
    return all(p.device.type == "cpu" and not isinstance(p, DTensor) for p in parameters) or None


def _fused_here(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state to load, whose groups say what suits the machine that wrote it, for this one."""
    groups = [dict(group) for group in state["param_groups"]]
    for saved, own in zip(groups, optimizer.param_groups, strict=False):  # torch compares numbers
        saved["fused"] = _fused(own["params"])
    return {**state, "param_groups": groups}


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients of parameters, sharded or whole, so that their joint norm is bounded.

    Args:
        parameters: those without a gradient are passed over.
        largest: norm that is left alone.

    Returns:
        The norm before, the same on every rank.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    pieces = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    squared = torch.nn.utils.get_total_norm(whole).square()
    if pieces:
        own = torch.nn.utils.get_total_norm(pieces).square()
        squared = squared.to(own.device) + all_reduce_sum(own)
    norm = squared.sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for grad in (*pieces, *whole):
        grad.mul_(factor)
    return norm


def warmup_cosine(samples: int, warmup: int, total: int, final: float) -> float:
    """Factor of the learning rate after `samples` training samples.

    Counting samples, not steps, keeps the schedule when the batch or the number of ranks changes.

    Args:
        samples: samples seen when the step ends.
        warmup: samples of linear warm-up.
        total: samples at which the cosine has come down.
        final: factor at the end, 0 to 1.
    """
    if samples < warmup:
        return samples / warmup
    progress = min(1.0, (samples - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


#: How `optimizer.lr` is meant: as it is, or for 256 images per step.
LR_RULES = ("absolute", "linear", "sqrt")


def learning_rate(config: dict[str, Any], samples_per_step: int) -> float:
    """The learning rate of a run, before warm-up and decay.

    Args:
        config: `optimizer` of the run's config; `lr` and `lr_rule`.
        samples_per_step: images of one optimizer step over all ranks.

    Raises:
        ConfigError: for an unknown rule.
    """
    rule = config.get("lr_rule", "absolute")
    if rule not in LR_RULES:
        raise ConfigError(
            f"optimizer.lr_rule={rule}: must be one of {', '.join(LR_RULES)}"
            f"{nearest(str(rule), LR_RULES)}"
        )
    ratio = samples_per_step / 256
    return config["lr"] * {"absolute": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]
