"""Small exports and sets of images for the tests of tokens."""

from pathlib import Path

import torch

from helpers import SIZES, config_of, images_of, picture
from vistok.core.configuration import compose, to_container
from vistok.data.shards import ShardWriter
from vistok.export.exporter import write_export
from vistok.models.build import build_tokenizer

FORMATS = ["megatron", "torchtitan", "nanogpt", "webdataset", "parquet", "llamagen"]


def small_tokenizer(
    tokenizer="vqgan_tiny", quantizer=("quantizer=vq", "quantizer.codebook_size=16")
):
    """A tokenizer for 16 px and its config, its codes started from images, without any training."""
    config = config_of(
        f"tokenizer={tokenizer}", *SIZES[tokenizer], "data.image_size=16", *quantizer
    )
    torch.manual_seed(0)
    tok = build_tokenizer(config)
    tok.initialize(tok.to_model_range(images_of(24)))
    return tok.eval(), config


def small_export(folder: Path, *args, **kwargs) -> Path:
    tok, config = small_tokenizer(*args, **kwargs)
    write_export(tok, config, folder, {})
    return folder


def small_shards(folder: Path, shards=3, images=4, captions=False) -> Path:
    """Tars of pictures with labels; the second image of the first does not decode."""
    from data.data_helpers import encode

    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with ShardWriter(folder, f"part{shard}", 10**7) as writer:
            for number in range(images):
                seed = shard * images + number
                image = encode(picture(seed, 20 + seed % 5, 24))
                if (shard, number) == (0, 1):
                    image = image[:40]
                others = {"txt": f"picture {seed}".encode()} if captions and number % 2 else {}
                writer.write(image, "png", label=seed % 3, others=others)
    return folder


def settings(model: Path, out: Path, *words: str) -> dict:
    """The resolved config of a command."""
    own = ["model=x", "out=x", "batch_size=3", "workers=1", "device=cpu", *words]
    return to_container(compose("tokenize", own)) | {"model": str(model), "out": str(out)}


def contents(folder: Path, without=()) -> dict[str, bytes]:
    """All files of a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }
