"""Folders of tokens that are made up: each id follows from the one before and the label."""

from pathlib import Path

import numpy as np

from vistok.data.token_shards import ShardRows, write_shard
from vistok.data.tokens import finish_folder


def make_tokens(
    folder: Path,
    sizes=(8,),
    num_tokens=6,
    grid=(2, 3),
    count=40,
    classes=3,
    shards=2,
    variable=False,
    captions=False,
    scales=None,
    seed=0,
    tokenizer_hash="ab" * 32,
) -> Path:
    """Write a folder of tokens."""
    folder.mkdir(parents=True)
    rng, names = np.random.default_rng(seed), []
    for shard in range(shards):
        rows = ShardRows()
        for number in range(count // shards):
            label = int(rng.integers(classes)) if classes else -1
            length = int(rng.integers(1, num_tokens + 1)) if variable else num_tokens
            before, ids = rng.integers(0, sizes), np.zeros((length, len(sizes)), dtype=np.int64)
            for place in range(length):
                noise = (rng.random(len(sizes)) < 0.2) * rng.integers(0, sizes)
                before = ids[place] = (before + label + 1 + noise) % np.array(sizes)
            rows.ids.append(ids)
            rows.labels.append(label)
            rows.keys.append(f"{shard}/{number}")
            rows.views.append(0)
            rows.captions.append(f"class {label}" if captions else None)
        names.append(f"tokens-{shard:06d}.safetensors")
        write_shard(folder / names[-1], rows, sizes, "uint16", {})
    streams = [
        {"name": f"codebook.{q}", "size": int(size), "offset": int(sum(sizes[:q]))}
        for q, size in enumerate(sizes)
    ]
    values = {
        "tokenizer_hash": tokenizer_hash,
        "num_tokens": num_tokens,
        "num_streams": len(sizes),
        "streams": streams,
        "vocabulary_size": int(sum(sizes)) + 5,
        "special": {},
        "classes": {"first": int(sum(sizes)) + 5, "count": classes},
        "order": "next_scale" if scales else "raster",
        "grid": list(grid) if grid else None,
        "scales": scales,
        "lengths": "variable" if variable else "fixed",
        "dtype": "uint16",
        "labels": bool(classes),
        "captions": captions,
    }
    finish_folder(folder, names, values)
    return folder
