"""Measure how fast the data come: `vistok bench-data`.

Three rates at one output size, taken in turns so that what else the machine does meets all of
them: the decoder alone in as many processes as there are workers, our stream, and a plain
WebDataset pipeline with Pillow and torchvision.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vistok.core.files import replacing
from vistok.core.terminal import counted
from vistok.data.decode import decode
from vistok.data.formats import IMAGE_EXTENSIONS
from vistok.data.order import SampleRandom
from vistok.tools.words import Option, Tool, flag, processes, seconds, whole

if TYPE_CHECKING:  # torch is imported where it is used: `--help` does not wait for it
    import torch

    from vistok.data.dataset import ImageDataset

_WARM = 4  # batches per worker before the clock starts


@dataclass(frozen=True)
class Options:
    """The measurement to make."""

    place: str | None = None
    image_size: int = 256
    crop: str = "resize_random"
    workers: int = 1
    batch_size: int = 64
    seconds: float = 8.0
    rounds: int = 3
    scaled_decode: bool = True
    plain: bool = True


def bench(options: Options) -> dict[str, Any]:
    """Return rates in images per second, their ratios, and the conditions of the measurement.

    Rates and ratios are medians over the rounds, each ratio of rates of one round.

    `raw_alone` is one process that only decodes, crops and resizes images in memory; `raw` is the
    sum over `workers` such processes at once, so it knows that cores share caches and clocks.
    """
    import torch

    from vistok.data.datamodule import VistokDataModule

    kind = _kind(options.place)
    data = VistokDataModule(
        kind,
        options.place,
        image_size=options.image_size,
        batch_size=options.batch_size,
        num_workers=options.workers,
        train_crop=options.crop,
        augment=["hflip"],
        split_shards=True,
        scaled_decode=options.scaled_decode,
    )
    data.prepare_data()
    data.setup("fit")
    takes: dict[str, Callable[[], float]] = {
        "raw_alone": lambda: raw_rate(data.train_set, 1, options.seconds),
        "raw": lambda: raw_rate(data.train_set, options.workers, options.seconds),
        "stream": lambda: loader_rate(data.train_dataloader(), options),
    }
    if options.plain and kind == "shards":
        takes["plain"] = lambda: loader_rate(plain_loader(options), options)
    rates: dict[str, list[float]] = {name: [] for name in takes}
    for _ in range(options.rounds):
        for name, take in takes.items():
            rates[name].append(take())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    # The machine's speed moves from round to round: only rates of one round compare.
    alone = [rate * options.workers for rate in rates["raw_alone"]]
    against = {"raw": rates["raw"], f"{options.workers} x raw_alone": alone}
    if "plain" in rates:
        against["plain"] = rates["plain"]
    ratios = {
        f"stream/{name}": statistics.median(np.divide(rates["stream"], others).tolist())
        for name, others in against.items()
    }
    return {
        "images_per_second": {name: round(value, 1) for name, value in medians.items()},
        "all_rounds": {name: [round(v, 1) for v in values] for name, values in rates.items()},
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "plain_is": plain_description() if "plain" in medians else None,
        "options": asdict(options),
        "images": data.num_train,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _kind(place: str | None) -> str:
    if place is None:
        return "sample"
    return "folder" if Path(place).expanduser().is_dir() else "shards"


def raw_rate(dataset: ImageDataset, workers: int, seconds: float) -> float:
    """Return the images per second that `workers` processes decode, crop and resize in memory."""
    count = min(len(dataset), 2048)
    members = np.arange(len(dataset)) if dataset.members is None else dataset.members
    images = [dataset.source.read(int(index))[1] for index in members[:count]]
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_decode_on, args=(dataset, images, seconds, start, results))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    total = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return total


def _decode_on(
    dataset: ImageDataset, images: list[bytes], seconds: float, start: Any, results: Any
) -> None:
    import torch

    torch.set_num_threads(1)
    transform, random, number = copy.copy(dataset.transform), SampleRandom(), 0
    transform.augment = ()
    out = torch.empty(*transform.size, dataset.channels, dtype=torch.uint8)
    for phase in (0.2, seconds):  # the first warms up
        start.wait()
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < phase:
            data = images[number % len(images)]
            seeded = partial(random, 0, 0, number)
            smaller = transform.reduction(seeded) if dataset.scaled else None
            transform.write(decode(data, dataset.channels, smaller), seeded(), out)
            number, done = number + 1, done + 1
        rate = done / (time.perf_counter() - begun)
    results.put(rate)


def loader_rate(loader: Iterable[Any], options: Options) -> float:
    """Return the images per second that come out of a running loader."""
    batches = iter(loader)
    for _ in range(_WARM * max(1, options.workers)):
        next(batches)
    begun, images = time.perf_counter(), 0
    while time.perf_counter() - begun < options.seconds:
        images += len(next(batches)["image"])
    return images / (time.perf_counter() - begun)


def plain_loader(options: Options) -> Iterable[Any]:
    """Return a usual pipeline: WebDataset, Pillow, torchvision (or the same with Pillow alone)."""
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset

    from vistok.data.places import expand_shards

    transform = _torchvision(options.image_size) or _pillow(options.image_size)

    def picked(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        name = next(name for name in sample if name.lower() in IMAGE_EXTENSIONS)
        return {"image": transform(sample[name])}

    urls = [str(path) for path in expand_shards(options.place or "", "SHARDS")]
    stream: Any = WebDataset(urls, shardshuffle=False, resampled=True).shuffle(200).decode("pil")
    return DataLoader(
        stream.map(picked), batch_size=options.batch_size, num_workers=options.workers
    )


def plain_description() -> str:
    """Name the libraries of the plain pipeline."""
    return "webdataset, Pillow, " + ("torchvision" if _torchvision(8) else "Pillow's resize")


def _torchvision(size: int) -> Callable[[Any], torch.Tensor] | None:
    """Return Resize, RandomCrop, RandomHorizontalFlip and ToTensor; None without torchvision."""
    try:
        from torchvision import transforms as T
    except Exception:  # its wheels fail in many ways next to another build of torch
        return None
    bicubic = T.InterpolationMode.BICUBIC
    steps = [T.Resize(size, bicubic), T.RandomCrop(size), T.RandomHorizontalFlip(), T.ToTensor()]
    return T.Compose([lambda image: image.convert("RGB"), *steps])


def _pillow(size: int) -> Callable[[Any], torch.Tensor]:
    """Return the same four steps without torchvision."""
    import torch
    from PIL import Image

    generator = np.random.default_rng(0)

    def transform(image: Any) -> torch.Tensor:
        image, scale = image.convert("RGB"), size / min(image.size)
        shape = (max(size, int(image.width * scale)), max(size, int(image.height * scale)))
        image = image.resize(shape, Image.Resampling.BICUBIC)
        left = int(generator.integers(image.width - size + 1))
        top = int(generator.integers(image.height - size + 1))
        array = np.array(image.crop((left, top, left + size, top + size)))
        array = array[:, ::-1] if generator.random() < 0.5 else array
        return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float() / 255

    return transform


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    options = result["options"]
    size, workers = options["image_size"], options["workers"]
    title = f"{size} px, {counted(workers, 'worker')}, {counted(result['images'], 'image')}"
    table = Table(title=title, show_edge=False)
    table.add_column("")
    table.add_column("images/s", justify="right")
    names = {
        "raw_alone": "decode and resize, one process alone",
        "raw": f"decode and resize, {counted(workers, 'process')} together",
        "stream": "vistok's stream",
        "plain": f"plain pipeline ({result['plain_is']})",
    }
    for name, rate in result["images_per_second"].items():
        table.add_row(names[name], f"{rate:.0f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for name, ratio in result["ratios"].items():
        console.print(f"{name} = {ratio:.3f}")


def _run(place: str | None, values: dict[str, Any]) -> None:
    out = values.pop("out")
    result = bench(Options(place, **values))
    _print(result)
    if out:
        with replacing(Path(out)) as file:
            file.write(json.dumps(result, indent=2).encode() + b"\n")


TOOL = Tool(
    name="bench-data",
    about="Measure the data stream in images per second, against the decoder alone and a plain "
    "pipeline.",
    place="[SHARDS]",
    place_is="pattern or folder",
    place_about="SHARDS is a pattern such as '/sets/train-{000000..000003}.tar', or a folder of "
    "images. Without it, the sample photographs are used, and the plain pipeline is not measured.",
    run=_run,
    options={
        "image_size": Option("side of a square, in pixels", whole(1), "256"),
        "crop": Option("crop policy, as data.train_crop", default="resize_random"),
        "workers": Option("number of processes; empty: one per core", processes),
        "batch_size": Option("images per batch", whole(1), "64"),
        "seconds": Option("length of each measurement", seconds, "8"),
        "rounds": Option("how often all is measured; medians are reported", whole(1), "3"),
        "scaled_decode": Option("as data.scaled_decode, for the decoder alone too", flag, "true"),
        "plain": Option("measure the plain pipeline", flag, "true"),
        "out": Option("file for the numbers, as JSON"),
    },
    examples=("", "/photos image_size=128 workers=4"),
)
