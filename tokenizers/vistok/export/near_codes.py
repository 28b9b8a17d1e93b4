"""How near codes are to each other, and how many ids survive a decoding: `vistok near-codes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vistok.checkpoints.hub import find_export
from vistok.checkpoints.load import load
from vistok.core.console import say
from vistok.core.errors import ConfigError, as_written
from vistok.core.values import is_whole
from vistok.data.decode import DecodeError, decode
from vistok.evaluation.inputs import choose_device
from vistok.export.data import image_sets, units_of
from vistok.export.views import Views
from vistok.models.tokenizer import Tokenizer

_CELLS = 2**24  # distances computed at once


def near_codes(config: dict[str, Any], data: list[str]) -> dict[str, Any]:
    """Write `near_codes.safetensors` and, with images, `survival.json`.

    Args:
        config: resolved `configs/near_codes.yaml`.
        data: words on the images; none for the table alone.

    Returns:
        What `survival.json` holds; empty without images.
    """
    for key in ("count", "images"):
        if not is_whole(config[key]) or config[key] < 1:
            raise ConfigError(
                f"{key}={as_written(config[key])}: must be a whole number of at least 1"
            )
    model = find_export(config["model"])
    tokenizer = load(model, device=choose_device(config["device"]))
    out = Path(str(config["out"])).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for slot, table in enumerate(tokenizer.codebooks()):
        ids, distances = nearest_codes(table, min(config["count"], len(table) - 1))
        tensors |= {f"codes.{slot}": ids, f"distances.{slot}": distances}
    save_file(tensors, out / "near_codes.safetensors", {"format": "pt"})
    said = out / "near_codes.safetensors"
    (said).chmod(0o666 & ~_umask(out))
    if not data:
        say(f"{said}: the nearest codes of each; data.train= also measures which ids survive")
        return {}
    images = _images(model, data, tokenizer, config["images"])
    results = survival(tokenizer, images)
    (out / "survival.json").write_text(json.dumps(results, indent=2) + "\n")
    say(f"{out}: {100 * results['share']:.1f} % of the ids survive decoding and encoding")
    return results


def _umask(folder: Path) -> int:
    probe = folder / ".umask"
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    return 0o666 & ~mode


@torch.no_grad()
def nearest_codes(table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the codes nearest to each, itself not among them.

    Args:
        table: `(K, d)`, in the space that distances are measured in.
        count: n, at most K - 1.

    Returns:
        Ids `(K, n)` int32, the nearest first, and Euclidean distances `(K, n)` float32.
    """
    table = table.double()
    ids, distances = [], []
    rows = max(1, _CELLS // len(table))
    for begin in range(0, len(table), rows):
        apart = torch.cdist(
            table[begin : begin + rows], table, compute_mode="donot_use_mm_for_euclid_dist"
        )
        own = torch.arange(len(apart))
        apart[own, begin + own] = torch.inf
        found = apart.topk(count, largest=False)
        ids.append(found.indices.int().cpu())
        distances.append(found.values.float().cpu())
    return torch.cat(ids), torch.cat(distances)


@torch.no_grad()
def survival(tokenizer: Tokenizer, images: Tensor, batch_size: int = 32) -> dict[str, Any]:
    """Return the share of ids that are the same after decoding and encoding again.

    The picture in between is rounded to 8 bits, as a file has it.

    Args:
        tokenizer: in eval mode.
        images: `(M, C, H, W)` uint8.
        batch_size: at once.

    Returns:
        `share` of all ids, `by_position` of each token, `images`, and the share of images of which
        all survive (`whole`).
    """
    same = []
    for part in images.split(batch_size):
        ids = tokenizer.tokenize(part)
        pictures = (tokenizer.detokenize(ids) * 255).round().to(torch.uint8)
        same.append((tokenizer.tokenize(pictures) == ids).cpu())
    kept = torch.cat(same).double()
    return {
        "share": kept.mean().item(),
        "whole": kept.flatten(1).all(dim=1).double().mean().item(),
        "by_position": kept.mean(dim=(0, 2)).tolist(),
        "images": len(kept),
    }


def _images(model: Path, data: list[str], tokenizer: Tokenizer, most: int) -> Tensor:
    sets = image_sets(model, data, tokenizer)
    units = units_of(sets, most)
    views = Views(tokenizer.image_size, sets.val_transform.crop, 1, 1.0, False)
    found: list[Tensor] = []
    for unit in range(len(units)):
        source, numbers = units.open(unit)
        for number in numbers:
            if len(found) == most:
                break
            try:
                found.append(views(decode(source.read(number)[1], tokenizer.channels))[0])
            except (DecodeError, OSError):
                continue
    if not found:
        raise ConfigError(f"{units.name}: none of the images can be used")
    return torch.stack(found).permute(0, 3, 1, 2).contiguous()
