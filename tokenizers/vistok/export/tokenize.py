"""Images in, tokens out: `vistok tokenize`."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vistok
from vistok.checkpoints.hub import find_export
from vistok.checkpoints.load import load
from vistok.core.console import say
from vistok.core.errors import DataError, VistokError
from vistok.core.terminal import counted
from vistok.data.inputs import end_with_parent
from vistok.data.token_shards import open_shard
from vistok.data.tokens import MANIFEST, TokenFolder, describe_shards, read_manifest, write_manifest
from vistok.export.data import image_sets, units_of
from vistok.export.formats.all import LAYOUTS, chosen, digest_of
from vistok.export.formats.base import Alphabet
from vistok.export.plan import Settings, claim_folder, manifest_values, plan_of
from vistok.export.progress import Bar, Counters
from vistok.export.tokenize_units import CLAIMS, Worker, unit_name
from vistok.export.units import claimed, share_of
from vistok.export.views import Views


def tokenize(config: dict[str, Any], data: list[str]) -> dict[str, Any] | None:
    """Tokenize a set of images, or this worker's part of it.

    Args:
        config: resolved `configs/tokenize.yaml`.
        data: words on the images, `data=...` and `data.*=...`.

    Returns:
        The manifest, if everything is done; None while other workers are at work.

    Raises:
        ConfigError: for a value that cannot be.
        DataError: if the folder holds other tokens, or a shard of images cannot be read.
    """
    settings = Settings.of(config)
    number, count = share_of(settings.worker)
    here = _processes(settings)
    worker = prepare(settings, data, computes=here == 1)
    if there := sum(worker.is_done(unit) for unit in range(len(worker.units))):
        say(f"{worker.out}: {there} of {counted(len(worker.units), 'shard')} done before")
    with Bar(len(worker.units), there) as bar:
        try:
            if here == 1:
                worker.told = bar.show
                worker.run(number, count)
            elif there < len(worker.units):
                _run_processes(config, data, (number * here, count * here, here), bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command continues") from None
    undone = sum(not worker.is_done(unit) for unit in range(len(worker.units)))
    if undone:
        say(
            f"{worker.out}: {counted(undone, 'shard')} with other workers; the last of them writes "
            f"{MANIFEST}. If none is running any more, run the same command again."
        )
        return None
    return _finish(worker)


def prepare(settings: Settings, data: list[str], computes: bool = True) -> Worker:
    """Return a worker, after the folder of tokens is known to be its own.

    Args:
        settings: of the command.
        data: its words on the images.
        computes: whether it will tokenize, or only look at what is done.
    """
    model = find_export(settings.model)
    device = settings.device if computes else torch.device("cpu")
    if computes and device.type == "cpu":
        torch.set_num_threads(settings.threads)
    tokenizer = load(model, device=device)
    settings.check_length(tokenizer)
    sets = image_sets(model, data, tokenizer)
    units = units_of(sets, settings.images_per_shard)
    crop = sets.val_transform.crop
    views = Views(tokenizer.image_size, crop, settings.crops, settings.crop_range, settings.flip)
    captions = "caption" in sets.field_names
    values = manifest_values(settings, tokenizer, model, views.names)
    if sets.kind != "shards":
        values["class_names"] = list(units.source.classes) if units.source else []
    plan = plan_of(settings, values, units, crop, captions)
    layouts, alphabet = chosen(settings.format), Alphabet.of(values)
    for layout in layouts:
        layout.check(alphabet)
    out = Path(settings.out).expanduser()
    claim_folder(out, plan)
    return Worker(
        out, tokenizer, units, views, plan, values, layouts, settings.decode_threads, captions
    )


# ---------------------------------------------------------------------- several processes


def _processes(settings: Settings) -> int:
    """Return how many processes this command starts."""
    if settings.workers is not None:
        return settings.workers
    if settings.device.type != "cpu" or "RANK" in os.environ:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // settings.threads)


def _run_processes(
    config: dict[str, Any], data: list[str], share: tuple[int, int, int], bar: Bar
) -> None:
    """Run workers in processes of their own, until all have ended."""
    first, count, here = share
    context = torch.multiprocessing.get_context("spawn")
    counters = Counters(context, here)
    processes = [
        context.Process(
            target=_work, args=(config, data, first + i, count, i, counters), daemon=True
        )
        for i in range(here)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            bar.show(counters.total())
            time.sleep(0.1)
            if any(process.exitcode for process in processes):
                break  # the others would go on for hours before anybody hears of it
    finally:
        for process in processes:
            process.terminate()
            process.join()
    if failed := [code for process in processes if (code := process.exitcode or 0) not in (0, -15)]:
        ended = f"was ended by signal {-failed[0]}" if failed[0] < 0 else "failed"
        raise DataError(
            counters.error()
            or f"a worker {ended}; the same command continues, with fewer workers= "
            "if memory was short"
        )


def _work(
    config: dict[str, Any],
    data: list[str],
    number: int,
    count: int,
    place: int,
    counters: Counters,
) -> None:
    """Be worker `number` of `count`."""
    from vistok.core.plugins import import_plugins

    end_with_parent()
    try:
        import_plugins(config["plugins"])
        worker = prepare(Settings.of(config), data)
        worker.told = counters.told(place)
        worker.run(number, count)
    except KeyboardInterrupt:
        raise SystemExit(0) from None  # the parent says it
    except Exception as error:
        known = isinstance(error, VistokError)
        counters.fail(str(error) if known else f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


# ---------------------------------------------------------------------- the whole folder


def _finish(worker: Worker) -> dict[str, Any] | None:
    """Write what belongs to the whole set; the manifest makes it a folder of tokens."""
    out = worker.out
    if manifest := _finished(worker):
        say(f"{out}: finished; nothing to do")
        return manifest
    with claimed(out / CLAIMS, "finish") as mine:
        if not mine:
            say(f"{out}: another worker is writing {MANIFEST}")
            return None
        names = [f"{unit_name(unit)}.safetensors" for unit in range(len(worker.units))]
        values = {**worker.values, **_contents(worker, names)}
        values["vocabulary_size"] += values["classes"]["count"]
        manifest = describe_shards(out, names, values)
        if not manifest["counts"]["samples"]:
            raise DataError(
                f"{worker.units.name}: none of the images can be used; {_first(worker)}"
            )
        alphabet = Alphabet.of(manifest)
        for layout in worker.layouts:
            layout.check(alphabet)
            if not layout.per_shard:
                (out / layout.name).mkdir(exist_ok=True)
                layout.write(out / layout.name, TokenFolder(out, False, manifest))
        written = [name for name in LAYOUTS if (out / name).is_dir()]
        manifest["formats"] = {name: digest_of(out / name) for name in written}
        write_manifest(out, manifest)
        _sweep(out)
    with suppress(OSError):
        (out / CLAIMS).rmdir()
    counts = manifest["counts"]
    say(
        f"{out}: {counted(counts['samples'], 'sample')} of {counted(manifest['images'], 'image')}, "
        f"{counted(counts['tokens'], 'token')} in {counted(len(names), 'shard')}"
    )
    if counts["left_out"]:
        say(f"[yellow]left out {counted(counts['left_out'], 'image')}; {_first(worker)}[/yellow]")
    return manifest


def _finished(worker: Worker) -> dict[str, Any] | None:
    """Return the manifest that is there, if it is this plan's and has all the formats asked for."""
    try:
        manifest = read_manifest(worker.out)
    except DataError:
        return None
    formats = manifest.get("formats") or {}
    whole = all(layout.name in formats for layout in worker.layouts)
    return manifest if whole and manifest.get("plan") == worker.plan["digest"] else None


def _contents(worker: Worker, names: list[str]) -> dict[str, Any]:
    """Return what the shards have: classes, labels and captions."""
    classes, labels, captions, images = 0, False, False, 0
    for name in names:
        shard = open_shard(worker.out / name, worker.alphabet.sizes)
        if len(shard):
            classes = max(classes, int(shard.labels.max()) + 1)
            labels |= bool((np.asarray(shard.labels) >= 0).any())
            captions |= shard.has_captions
            images += int((np.asarray(shard.views) == 0).sum())
    known = worker.values.get("class_names") or []
    first = worker.values["classes"]["first"]
    return {
        "classes": {"first": first, "count": max(classes, len(known))},
        "class_names": known or None,
        "labels": labels,
        "captions": captions,
        "images": images,
        "plan": worker.plan["digest"],
        "made_with": {
            "vistok": vistok.__version__,
            "torch": str(torch.__version__),
            **{key: worker.plan[key] for key in ("device", "precision", "batch_size", "threads")},
        },
    }


def _first(worker: Worker) -> str:
    """Return key and reason of the first image that was left out."""
    for unit in range(len(worker.units)):
        path = worker.out / f"{unit_name(unit)}.safetensors"
        if found := open_shard(path, worker.alphabet.sizes).left_out:
            return f"{found[0][0]}: {found[0][1]}"
    return ""


def _sweep(out: Path) -> None:
    """Remove what workers left that were killed; none is at work when all is done."""
    for path in [*out.glob(".*.tmp"), *out.glob("*/.*.tmp"), *(out / CLAIMS).glob("tokens-*")]:
        with suppress(OSError):
            path.unlink()
