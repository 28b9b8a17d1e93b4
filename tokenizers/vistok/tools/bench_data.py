"""How fast the data come: `vistok bench-data`.

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
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vistok.core.errors import ConfigError, VistokError, nearest
from vistok.core.files import replacing
from vistok.data.dataset import ImageDataset
from vistok.data.decode import IMAGE_EXTENSIONS, decode
from vistok.data.order import SampleRandom

HELP = """\
Measure the data stream: images per second, against the decoder alone and a plain pipeline.

  {program} [SHARDS] [option=value ...]

SHARDS is a pattern such as '/sets/train-{{000000..000003}}.tar', or a folder of images. Without it
the sample photographs are used, and there is no plain pipeline.

  image_size=256         pixels of a square
  crop=resize_random     crop policy, as data.train_crop
  workers=               processes; empty for one per core
  batch_size=64
  seconds=8              of each measurement
  rounds=3               of all measurements; medians over them are reported
  scaled_decode=true     as data.scaled_decode, for the decoder alone too
  plain=true             measure the plain pipeline
  out=                   file for the numbers, as JSON
  debug=false            show the traceback of an error
"""

_WARM = 4  # batches per worker before the clock starts


@dataclass(frozen=True)
class Options:
    """What to measure."""

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
    """Measure; returns rates in images per second, their ratios, and what they were taken on.

    Rates and ratios are medians over the rounds, each ratio of rates of one round.

    `raw_alone` is one process that only decodes, crops and resizes images in memory; `raw` is the
    sum over `workers` such processes at once, so it knows that cores share caches and clocks.
    """
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
    """Images per second of `workers` processes that decode, crop and resize from memory."""
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
    """Images per second that come out of a loader, once it runs."""
    batches = iter(loader)
    for _ in range(_WARM * max(1, options.workers)):
        next(batches)
    begun, images = time.perf_counter(), 0
    while time.perf_counter() - begun < options.seconds:
        images += len(next(batches)["image"])
    return images / (time.perf_counter() - begun)


def plain_loader(options: Options) -> Iterable[Any]:
    """What one would write: WebDataset, Pillow, torchvision (or the same with Pillow alone)."""
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset

    from vistok.data.sources import expand_shards

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
    """What the plain pipeline resizes with."""
    return "webdataset, Pillow, " + ("torchvision" if _torchvision(8) else "Pillow's resize")


def _torchvision(size: int) -> Callable[[Any], torch.Tensor] | None:
    """Resize, RandomCrop, RandomHorizontalFlip, ToTensor; None where it cannot be imported."""
    try:
        from torchvision import transforms as T
    except Exception:  # its wheels fail in many ways beside another build of torch
        return None
    bicubic = T.InterpolationMode.BICUBIC
    steps = [T.Resize(size, bicubic), T.RandomCrop(size), T.RandomHorizontalFlip(), T.ToTensor()]
    return T.Compose([lambda image: image.convert("RGB"), *steps])


def _pillow(size: int) -> Callable[[Any], torch.Tensor]:
    """The same four steps without torchvision."""
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


def _parse(arguments: Sequence[str]) -> tuple[Options, str | None]:
    known = {"image_size": 1, "workers": 1, "batch_size": 1, "rounds": 1}
    values: dict[str, Any] = {"workers": os.cpu_count() or 1}
    out = None
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or "/" in name:
            if "place" in values:
                raise ConfigError(f"{argument}: name one pattern or folder; see --help")
            values["place"] = argument
        elif name in known:
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"{argument}: must be a whole number of at least 1")
            values[name] = int(value)
        elif name == "seconds":
            try:
                values[name] = float(value)
            except ValueError:
                raise ConfigError(f"{argument}: must be a number of seconds") from None
        elif name in ("scaled_decode", "plain"):
            if value not in ("true", "false"):
                raise ConfigError(f"{argument}: must be true or false")
            values[name] = value == "true"
        elif name == "crop":
            values[name] = value
        elif name == "out":
            out = value
        elif name != "debug":
            names = [*known, "seconds", "scaled_decode", "plain", "crop", "out", "debug"]
            raise ConfigError(f"unknown option {name}={nearest(name, names)}; see --help")
    return Options(**values), out


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    options = result["options"]
    size, workers = options["image_size"], options["workers"]
    table = Table(title=f"{size} px, {workers} workers, {result['images']} images", show_edge=False)
    table.add_column("")
    table.add_column("images/s", justify="right")
    names = {
        "raw_alone": "decode and resize, one process alone",
        "raw": f"decode and resize, {workers} processes together",
        "stream": "our stream",
        "plain": f"plain pipeline ({result['plain_is']})",
    }
    for name, rate in result["images_per_second"].items():
        table.add_row(names[name], f"{rate:.0f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for name, ratio in result["ratios"].items():
        console.print(f"{name} = {ratio:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (2 for an error that the user can mend)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "help"} & set(arguments):
        script = sys.argv[0].endswith("bench_data.py")
        program = "uv run scripts/bench_data.py" if script else "vistok bench-data"
        print(HELP.format(program=program), end="")
        return 0
    try:
        options, out = _parse(arguments)
        result = bench(options)
        _print(result)
        if out:
            with replacing(Path(out)) as file:
                file.write(json.dumps(result, indent=2).encode() + b"\n")
        return 0
    except (VistokError, OSError) as error:
        if "debug=true" in arguments:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
