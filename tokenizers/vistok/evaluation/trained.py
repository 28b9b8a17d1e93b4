"""The page of a run that just ended: its last validation, pictures and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistok.data.datamodule import VistokDataModule
from vistok.evaluation.described import (
    describe_machine,
    describe_model,
    describe_protocol,
    whole_protocol,
)
from vistok.evaluation.pairs import Pairs, TokenizerPairs, source_name
from vistok.evaluation.protocol import protocol_hash
from vistok.evaluation.results import save_pictures, write_json
from vistok.metrics.image import PSNR, SSIM
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer

#: Folder of the last validation, in the run's.
FOLDER = "validation"


def pictures_of(tokenizer: Tokenizer, data: VistokDataModule, count: int) -> list[Pairs]:
    """Return validation images and what becomes of them, at several numbers of tokens.

    Every rank must call it: weights may be sharded.

    Args:
        tokenizer: a flexible one is shown at powers of two.
        data: a DataModule that is set up.
        count: images, spread evenly over the set.
    """
    most, budgets = tokenizer.num_tokens, []
    if isinstance(tokenizer, FlexibleTokenizer) and tokenizer.quantizer.per_token:
        budgets = [2**n for n in range(most.bit_length()) if 2**n < most]
    source = TokenizerPairs(tokenizer, data, budgets)
    wanted = min(count, data.num_val)
    numbers = [int((i + 0.5) * data.num_val / wanted) for i in range(wanted)]
    step = source.pick_size
    return [source.pick(numbers[i : i + step]) for i in range(0, len(numbers), step)]


def write_trained(
    folder: Path,
    tokenizer: Tokenizer,
    data: VistokDataModule,
    results: Mapping[str, Any],
    pairs: Sequence[Pairs],
    weights: str,
    precision: str,
) -> Path:
    """Write the last validation of a run to its folder, and `report.html`.

    Args:
        folder: of the run.
        tokenizer: that was trained.
        data: its images.
        results: of the validation.
        pairs: what `pictures_of` returned.
        weights: "ema" or "last".
        precision: of the networks in validation.

    Returns:
        The page.
    """
    from vistok.evaluation.report.page import write_report

    out = folder / FOLDER
    metrics = {"psnr": PSNR(), "ssim": SSIM()}
    described = describe_protocol(tokenizer, data, weights, precision)
    protocol = whole_protocol(described, metrics)
    protocol["images"]["count"] = results["images"]
    numbers = [number for pair in pairs for number in pair.numbers]
    shown = tokenizer.num_tokens
    written = {
        "format": 1,
        **results,
        "weights": weights,
        "crop": protocol["images"]["crop"],
        "precision": precision,
        "data": source_name(data.val_set.source),
        "protocol_hash": protocol_hash(protocol),
        "protocol": protocol,
        "model": describe_model(tokenizer, hashed=False),
        "machine": describe_machine(data.eval_batch_size, tokenizer.device),
        "higher_is_better": {"psnr": True, "ssim": True},
        "budgets": [],
        "extremes": {},
        "pictures": save_pictures(out / "pictures", pairs, numbers, shown),
    }
    write_json(out / "metrics.json", written)
    return write_report(out, folder)
