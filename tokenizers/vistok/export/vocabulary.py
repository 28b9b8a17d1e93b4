"""What the ids of a tokenizer mean to a model of sequences: `vocabulary.json` of an export."""

from __future__ import annotations

import math
from typing import Any

from vistok.data.tokens import smallest_dtype
from vistok.models.flexible import FlexibleTokenizer
from vistok.models.tokenizer import Tokenizer

#: The form of `vocabulary.json` that is written today.
FORMAT = 1

#: Ids that follow the codes, in this order; those of classes come behind them.
SPECIAL = ("begin_of_image", "end_of_image", "padding", "mask", "unconditional")

#: Codebooks with more codes than this are also described as digits, each predicted by itself.
_HUGE = 2**16


def vocabulary(tokenizer: Tokenizer, num_classes: int = 0) -> dict[str, Any]:
    """Return the vocabulary of a tokenizer.

    Ids of all streams are one range: id i of stream q is `streams[q].offset + i`. Codes come first,
    then the special ids, then one for each class: so the number of classes moves no other id.

    Args:
        tokenizer: whose ids.
        num_classes: of the pictures.
    """
    quantizer, grid = tokenizer.quantizer, tokenizer.encoder.grid
    sizes = list(quantizer.codebook_sizes)
    codes, digits = sum(sizes), quantizer.digits()
    counts = None if digits is None else [len(values) for values in digits]
    scales = quantizer.scales_of(tokenizer.encoder.num_tokens, grid)
    lengths = _lengths(tokenizer)
    return {
        "format": FORMAT,
        "num_tokens": tokenizer.num_tokens,
        "num_streams": len(sizes),
        "streams": [
            {"name": f"codebook.{q}", "size": size, "offset": sum(sizes[:q])}
            | ({"factors": factors(size, counts)} if size > _HUGE else {})
            for q, size in enumerate(sizes)
        ],
        "digits": digits,
        "num_codes": codes,
        "special": {name: codes + number for number, name in enumerate(SPECIAL)},
        "classes": {"first": codes + len(SPECIAL), "count": num_classes},
        "vocabulary_size": codes + len(SPECIAL) + num_classes,
        "dtype": smallest_dtype(codes + len(SPECIAL) + num_classes - 1).name,
        "flattening": "token by token; the ids of a token in the order of the streams",
        "order": "next_scale" if scales else tokenizer.token_order,
        "grid": None if grid is None else list(grid),
        "scales": None if scales is None else [list(scale) for scale in scales],
        "parts": _parts(tokenizer),
        "lengths": lengths,
    }


def _lengths(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return which prefixes of a code are codes: `budgets` has their lengths."""
    most = tokenizer.num_tokens
    if isinstance(tokenizer, FlexibleTokenizer) and tokenizer.quantizer.per_token:
        budgets = tokenizer.length.budgets(most)
        if len(budgets) > 1:
            every = budgets == list(range(1, most + 1))
            return {"kind": "prefix", "most": most, "budgets": "all" if every else budgets}
    return {"kind": "fixed", "most": most, "budgets": [most]}


def _parts(tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
    """Return the stretches of a sequence whose ids are from different parts of each stream."""
    quantizer: Any = tokenizer.quantizer
    lengths, offsets = getattr(quantizer, "lengths", None), getattr(quantizer, "offsets", None)
    if not isinstance(lengths, list) or offsets is None:
        return None
    return [
        {"tokens": length, "first": first.tolist(), "size": size.tolist()}
        for length, first, size in zip(lengths, offsets, quantizer.sizes, strict=True)
    ]


def factors(size: int, digits: list[int] | None = None) -> list[int]:
    """Return two numbers of ids that stand for one: id = first + factors[0] * second.

    Their product is `size` wherever it has such divisors, and as near to square as can be. Of
    digits each of the two gets whole ones.

    Args:
        size: of the codebook.
        digits: values of each digit of an id, the least significant first.
    """
    if digits:
        places = [math.prod(digits[:number]) for number in range(1, len(digits))]
    else:
        places = [low for low in range(2, math.isqrt(size) + 1) if size % low == 0]
    if not places:
        low = math.isqrt(size - 1) + 1
        return [low, -(-size // low)]
    low = min(places, key=lambda place: abs(math.log(place) - math.log(size) / 2))
    return [low, size // low]
