#!/usr/bin/env python
"""Compare a whole step with the sum of its parts: `bench_step.py [rounds] [key=value ...]`.

Parts are the step without the adversary and the terms that look through a network; of each network
the forward over images and the forward and backward over reconstructions; and the discriminator's
forward and backward over both, once each. Nothing is looked at twice, so the whole should be little
more than the sum, in operations and in seconds. Rounds alternate, so that what else the machine
does meets all of them; the ratio of a round is of times next to each other, and the least one is
reported, too. `loss=mse_hed_vgg` needs its weights, see docs/guide/metrics.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vistok.core.configuration import compose, to_container
from vistok.core.outputs import Prediction, QuantizerOutput, TokenizerOutput
from vistok.losses.gradients import leaf_of
from vistok.losses.objective import build_objective
from vistok.losses.perceptual import NetworkTerm
from vistok.models.build import build_tokenizer
from vistok.models.term import Step
from vistok.training.optimizers import build_optimizer

#: Of pictures that no code stands for.
NO_CODES = QuantizerOutput(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), {})


def words_of(given: list[str]) -> list[str]:
    """Return words that compose a step in which all terms count: an adversary, from the start."""
    choice = [] if any(w.startswith("adversary=") for w in given) else ["adversary=patch"]
    term = "loss.terms.adversarial"
    starts = [f"{term}.{key}=0" for key in ("start", "ramp", "start_samples", "ramp_samples")]
    return [*choice, *given, *starts]


def bench(words: list[str], rounds: int) -> dict[str, float]:
    """Return medians in seconds, floating-point operations, and ratios of the whole to its parts.

    Args:
        words: overrides of the training config.
        rounds: that are timed; 0 to count operations alone.
    """
    config = to_container(compose("train", words_of(words)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer(config).to(device)
    objective = build_objective(config["loss"], tokenizer).to(device)
    objective.equip(build_optimizer)
    objective.players_to(torch.device(device))
    terms = config["loss"]["terms"]
    looking = {name: t for name, t in objective.terms.items() if isinstance(t, NetworkTerm)}
    plain_terms = {**terms, "adversarial": None, **dict.fromkeys(looking)}
    plain = build_objective({"terms": plain_terms}, tokenizer).to(device)
    data = config["data"]
    size = tokenizer.image_size
    images = torch.rand(data["batch_size"], data["channels"], *size, device=device) * 2 - 1
    net = objective.players["adversarial"].discriminator  # type: ignore[attr-defined]

    def whole() -> None:
        output = tokenizer(images, objective.taps)
        objective(Step(images, output, tokenizer))["total"].backward()
        objective.learn(1.0, nullcontext())

    def without() -> None:
        output = tokenizer(images, plain.taps)
        plain(Step(images, output, tokenizer))["total"].backward()

    def looked() -> None:
        """Compare other pictures with the images, terms that share a network at one go."""
        pictures = 0.9 * leaf_of(images)  # what somebody differentiates by itself is not shared
        compared = Prediction(pictures, images, "pixels")
        step = Step(images, TokenizerOutput({"image": compared}, NO_CODES), tokenizer)
        if looking:
            torch.stack([term(step) for term in looking.values()]).sum().backward()

    def judged() -> None:
        """Judge as many images once each, with gradients of the network; of one half for pixels."""
        net.requires_grad_(True)
        leaf = leaf_of(images)
        net(leaf).mean().backward()
        net(images).mean().backward()
        net.requires_grad_(False)

    def seconds(work: Callable[[], None]) -> float:
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - begun
        tokenizer.zero_grad()
        objective.discard()
        return spent

    names = ("whole", "without", "networks", "discriminator")
    works = (whole, without, looked, judged)
    flops = [operations(work) for work in works]
    for work in works:
        seconds(work)  # clears what the count has left, and warms up
    found: dict[str, float] = {"flops_ratio": flops[0] / sum(flops[1:])}
    if rounds:
        times = [[seconds(work) for work in works] for _ in range(rounds)]
        ratios = [row[0] / sum(row[1:]) for row in times]
        columns = [statistics.median(column) for column in zip(*times, strict=True)]
        found |= dict(zip(names, columns, strict=True))
        found |= {"ratio_median": statistics.median(ratios), "ratio_least": min(ratios)}
    return found | {f"flops_{name}": count for name, count in zip(names, flops, strict=True)}


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions, also in backward passes.

    torch's FlopCounterMode does so by module, with hooks that bear no gradient taken in between.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation and count it."""
        found = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


def operations(work: Callable[[], None]) -> int:
    """Return how many operations some work takes."""
    with Operations() as counted:
        work()
    return counted.total


if __name__ == "__main__":
    given = sys.argv[1:]
    number = int(given.pop(0)) if given and given[0].isdecimal() else 9
    print(json.dumps(bench(given, number), indent=2))
