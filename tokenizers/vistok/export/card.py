"""The card of an export: its `README.md`."""

from __future__ import annotations

import json
from typing import Any

from vistok.core.registry import resolve
from vistok.core.terminal import counted


def card(description: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Return the `README.md` of an export.

    Args:
        description: its `config.json`.
        metrics: what was measured: numbers, and of an evaluation also `protocol`, `protocol_hash`
            and `data`.
    """
    io = description["io"]
    name = resolve(description["tokenizer"]["_target_"]).__name__
    quantizer = resolve(description["quantizer"]["_target_"]).__name__
    rows = [
        f"| {k} | {v:.4g} |" if isinstance(v, float) else f"| {k} | {v} |"
        for k, v in metrics.items()
        if isinstance(v, (int, float)) and k != "format"
    ]
    table = "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "Not evaluated yet."
    if "protocol" in metrics:
        protocol = json.dumps(metrics["protocol"], indent=2)
        count = metrics["protocol"].get("images", {}).get("count", 0)
        table += (
            f"\n\nOn {counted(count, 'image')} of `{metrics['data']}`, protocol "
            f"`{metrics['protocol_hash']}`:"
            f"\n\n```json\n{protocol}\n```"
        )
    size = " x ".join(map(str, io["image_size"]))
    sizes = zip(io["codebook_sizes"], io["codebook_dims"], strict=True)
    books = [f"{count} codes of dimension {dim}" for count, dim in sizes]
    licence = description["license"]
    return f"""---
library_name: vistok
tags: [visual-tokenizer]
{f"license: {licence}" if licence else "# no license was chosen: vistok export ... license=..."}
---

# {name} with {quantizer}

A discrete visual tokenizer, exported by vistok {description["vistok"]}.

| | |
|---|---|
| images | {size} pixels, {io["channels"]} channels, {io["image_range"]}, crop `{io["crop"]}` |
| tokens | {io["num_tokens"]} per image, {len(books)} ids each, order: {io["token_order"]} |
| codebooks | {", ".join(books)} |
| size | {io["bits_per_image"]:.0f} bits per image |
| license | {licence or "not chosen"} |

## Measured

{table}

## Use

```python
import vistok

tok = vistok.load("path/to/this/folder")
images = tok.preprocess(["a.jpg", "b.png"])  # paths or PIL images -> (B, C, H, W) uint8
ids = tok.tokenize(images)                   # -> (B, N, Q) int64
rec = tok.detokenize(ids)                    # float in [0, 1]
```

`codebook.safetensors` needs safetensors alone: `codebook.q` is the table of index slot q;
`decoder_input`, where ids have one slot, holds the vector that the decoder gets for each id.
`vocabulary.json` says what the ids mean to a language model, `preprocess.json` how images are cut,
and `checksums.json` has the SHA-256 of every file, which `vistok.load` compares.
"""
