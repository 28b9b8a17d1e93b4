#!/usr/bin/env python
"""Compare an adversarial step with the sum of its parts: `bench_step.py [rounds] [key=value ...]`.

Parts are the step without the adversary, and the discriminator's forward and backward over images
and over reconstructions, once each. No image is judged twice, so the whole should be little more
than the sum. Rounds alternate, so that what else the machine does meets all of them; the ratio of a
round is of times next to each other, and the least one is reported, too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))

import torch

from vistok.core.configuration import compose, to_container
from vistok.losses.gradients import leaf_of
from vistok.losses.objective import build_objective
from vistok.models.build import build_tokenizer
from vistok.models.term import Step
from vistok.training.optimizers import build_optimizer


def bench(words: list[str], rounds: int) -> dict[str, float]:
    """Return medians in seconds, and ratios of the whole to the sum of its parts."""
    own = ["adversary=patch", "loss.terms.adversarial.start=0", "loss.terms.adversarial.ramp=0"]
    config = to_container(compose("train", [*own, *words]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = build_tokenizer(config).to(device)
    objective = build_objective(config["loss"], tokenizer).to(device)
    objective.equip(build_optimizer)
    objective.players_to(torch.device(device))
    plain_terms = {**config["loss"]["terms"], "adversarial": None}
    plain = build_objective({"terms": plain_terms}, tokenizer).to(device)
    data = config["data"]
    size = tokenizer.image_size
    images = torch.rand(data["batch_size"], data["channels"], *size, device=device) * 2 - 1
    net = objective.players["adversarial"].discriminator  # type: ignore[attr-defined]

    def whole() -> None:
        losses = objective(Step(images, tokenizer(images), tokenizer))
        losses["total"].backward()
        objective.learn(1.0, nullcontext())

    def without() -> None:
        plain(Step(images, tokenizer(images), tokenizer))["total"].backward()

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

    for work in (whole, without, judged):
        seconds(work)
    times = [[seconds(work) for work in (whole, without, judged)] for _ in range(rounds)]
    ratios = [a / (b + c) for a, b, c in times]
    columns = [statistics.median(column) for column in zip(*times, strict=True)]
    names = ("whole", "without_adversary", "discriminator")
    found = dict(zip(names, columns, strict=True))
    return found | {"ratio_median": statistics.median(ratios), "ratio_least": min(ratios)}


if __name__ == "__main__":
    given = sys.argv[1:]
    number = int(given.pop(0)) if given and given[0].isdecimal() else 9
    print(json.dumps(bench(given, number), indent=2))
