"""`report.html`: one page that shows a measurement, a training, or both, and needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vistok.core.errors import CheckpointError
from vistok.core.files import replacing
from vistok.core.terminal import counted
from vistok.evaluation.inputs import beside
from vistok.evaluation.plots import Panel, heat, svg
from vistok.evaluation.report import charts
from vistok.evaluation.report.generated import generated_html, generated_parts, is_generated
from vistok.evaluation.report.parts import (
    budgets_shown,
    e,
    facts,
    leaves,
    number,
    per_image,
    script_data,
    table,
)
from vistok.evaluation.results import read_json

#: Cards at the top: what comes first, where it was measured.
_FIRST = (
    "psnr", "ssim", "ms_ssim", "num_tokens", "bits_per_image", "bits_per_pixel",
    "codebook_usage", "perplexity", "dead_codes",
)  # fmt: skip

#: Numbers of `metrics.json` that are not results of the measurement.
_ASIDE = ("format", "images", "skipped_images", "images_per_second", "codec_images")

_SHOWN_MAPS = 64


def write_report(measured: Path | None, folder: Path) -> Path:
    """Write `report.html`.

    Args:
        measured: a folder with `metrics.json`; None for a training alone.
        folder: where the page goes; training curves are those of the run in it.

    Returns:
        The page.

    Raises:
        CheckpointError: if the results are damaged.
    """
    results = read_json(measured / "metrics.json") if measured else {}
    rows = charts.training_rows(folder)
    summary = folder / "summary.json"
    told = read_json(summary) if summary.is_file() else {}
    name = folder.resolve().name
    if measured and is_generated(results):
        shown = generated_parts(results, measured)
    elif measured:
        shown = [
            _pictures(results, measured),
            _curves(results),
            _extremes(results, measured),
            _codes(results, measured),
        ]
    else:
        shown = []
    protocol = _protocol(results) if "protocol" in results else ""
    parts = [_head(name, results, told), *shown, _training(rows), protocol]
    values = per_image(measured / "per_image.csv", results) if measured else {}
    page = _page(name, "\n".join(filter(None, parts)), script_data(results, values))
    with replacing(folder / "report.html") as file:
        file.write(page.encode())
    return folder / "report.html"


def find_measured(folder: Path) -> tuple[Path | None, Path]:
    """Return where the results of a run, an export or an evaluation lie, and the page's folder.

    Raises:
        CheckpointError: if there is nothing to show.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a run, an export or its eval/")
    if (folder / "metrics.json").is_file():
        inside = folder.name in ("eval", "validation") and (folder.parent / "config.yaml").is_file()
        return folder, folder.parent if inside else folder
    for name in ("eval", "validation"):
        if (folder / name / "metrics.json").is_file():
            return folder / name, folder
    if (beside(folder) / "metrics.json").is_file():  # of an export
        return beside(folder), beside(folder)
    if (folder / "metrics.jsonl").is_file() or (folder / "metrics.csv").is_file():
        return None, folder
    raise CheckpointError(
        f"{folder}: nothing was measured here yet (no eval/metrics.json, no metrics.jsonl)"
    )


# ---------------------------------------------------------------------- parts


def _page(name: str, body: str, data: str) -> str:
    style, script = (_asset(file) for file in ("page.css", "page.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{e(name)} · vistok</title>
<style>
{style}</style>
</head>
<body>
{body}
</main>
<dialog id="zoom" aria-label="One image"><div class="inside">
<div class="top"><span></span><button id="previous">←</button><button id="next">→</button>
<button id="larger">fit</button><button id="apart" aria-pressed="false">difference × 4</button>
<button id="close">close</button></div>
<div class="stage"><div class="wipe"><img alt="original"><img alt="reconstruction"></div></div>
<label>original <input type="range" id="wipe" min="0" max="100" value="50"
aria-label="Divider between original and reconstruction"> reconstruction</label>
</div></dialog>
<footer>Written by vistok. Pictures are stored without loss; nothing is loaded from
elsewhere.</footer>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return (resources.files("vistok.evaluation.report") / name).read_text("utf-8")


def _head(name: str, results: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    lines = [f"<header><h1>{e(name)}</h1>"]
    if model := results.get("model"):
        sizes = model["codebook_sizes"]
        books = f"{sizes[0]} codes" if len(set(sizes)) == 1 else f"{sizes} codes"
        slots = f" in each of {len(sizes)} slots" if len(sizes) > 1 else ""
        millions = f"{model['parameters'] / 1e6:.2f} M parameters"
        lines.append(
            f"<p>{e(model['tokenizer'])} with {e(model['quantizer'])}: {millions}, "
            f"{model['num_tokens']} tokens, {e(books + slots)}</p>"
        )
    if results:
        words = generated_html(results) if is_generated(results) else measured_html(results)
        lines.append(f"<p>{words}</p>")
        numbers = _cards(results)
    else:
        lines.append("<p class='soft'>A training; nothing else was measured yet.</p>")
        numbers = {k: v for k, v in told.items() if charts.is_number(v)}
    cards = "".join(
        f"<div><b>{number(v)}</b><span>{e(charts.title(k))}</span></div>"
        for k, v in numbers.items()
    )
    lines.append(f'<div class="cards">{cards}</div></header><main>')
    return "\n".join(lines)


def measured_html(results: Mapping[str, Any]) -> str:
    """Return which images were measured, how many, and under which protocol."""
    images = results["protocol"]["images"]
    size = f"{images['width']} × {images['height']} px, " if images.get("height") else ""
    weights = {"ema": "averaged weights", "last": "raw weights"}.get(
        results["protocol"].get("weights", ""), ""
    )
    noun = "image" if images["count"] == 1 else "images"
    words = f"{size}crop {e(str(images['crop']))}" + (f", {weights}" if weights else "")
    return (
        f"Measured on <b>{images['count']} {noun}</b> of <code>{e(str(results['data']))}</code> "
        f"({words}). Protocol <a href='#protocol'><code>{results['protocol_hash'][:12]}</code></a>."
    )


def _cards(results: Mapping[str, Any]) -> dict[str, float]:
    numbers = {
        k: v
        for k, v in results.items()
        if charts.is_number(v) and k not in _ASIDE and not k.endswith("_images")
    }
    first = [name for name in _FIRST if name in numbers]
    names = [*first[:3], *(k for k in numbers if k not in _FIRST), *first[3:]]
    return {name: numbers[name] for name in dict.fromkeys(names)}


# ---------------------------------------------------------------------- pictures


def _image(path: Path) -> str:
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _figure(entry: Mapping[str, Any], folder: Path, shown: str, fixed: str = "") -> str:
    original = _image(folder / entry["original"])
    files = entry["files"] if entry["spread"] and not fixed else {shown: entry["files"][shown]}
    stack = "".join(
        f'<img alt="" data-tokens="{tokens}"'
        f'{" data-only" if len(files) == 1 else ""} src="{_image(folder / name)}">'
        for tokens, name in sorted(files.items(), key=lambda item: int(item[0]))
    )
    key = e(entry["key"])
    return (
        f'<figure data-number="{entry["number"]}" data-key="{key}" data-fixed="{e(fixed)}">'
        f'<button class="triple" aria-label="Enlarge {key}">'
        f'<span class="tile"><img class="original" alt="original" src="{original}"></span>'
        f'<span class="tile"><span class="stack">{stack}</span></span>'
        f'<span class="tile difference"><img alt="" src="{original}">'
        f'<span class="stack">{stack}</span></span></button>'
        f'<figcaption><span>{key}</span><span class="value"></span></figcaption></figure>'
    )


_HEADS = '<div class="heads"><span>original</span><span>reconstruction</span>'
_HEADS += "<span>difference × 4</span></div>"


def _pictures(results: Mapping[str, Any], measured: Path) -> str:
    spread = [p for p in results.get("pictures", []) if p["spread"]]
    if not spread:
        return ""
    budgets = budgets_shown(results)
    slider = ""
    if len(budgets) > 1:
        last = len(budgets) - 1
        slider = (
            '<div class="bar"><label for="budget">Tokens</label>'
            f'<input type="range" id="budget" min="0" max="{last}" value="{last}" step="1">'
            '<output id="chosen" for="budget"></output></div>'
        )
    figures = "\n".join(_figure(p, measured / "pictures", budgets[-1]) for p in spread)
    return (
        '<section id="pictures"><h2>Reconstructions</h2>'
        f"<p class='note'>{len(spread)} of the measured images, evenly spread over the set: "
        "original, reconstruction, and four times their difference. Click to enlarge.</p>"
        f'{slider}<div class="gallery">{figures}</div></section>'
    )


def _extremes(results: Mapping[str, Any], measured: Path) -> str:
    found = results.get("extremes") or {}
    entries = {p["number"]: p for p in results.get("pictures", [])}
    found = {
        name: sides
        for name, sides in found.items()
        if all(x["number"] in entries for side in sides.values() for x in side)
    }
    if not found:
        return ""
    shown = max((b for p in entries.values() for b in p["files"]), key=int)
    tabs, panes = [], []
    for position, (name, sides) in enumerate(found.items()):
        chosen = "true" if position == 0 else "false"
        tabs.append(
            f'<button role="tab" aria-selected="{chosen}" data-opens="extreme-{e(name)}">'
            f"{e(charts.title(name))}</button>"
        )
        galleries = "".join(
            f"<h3>{word}</h3>"
            '<div class="gallery">'
            + "".join(
                _figure(
                    entries[x["number"]], measured / "pictures", shown,
                    f"{name} {number(x['value'])}",
                )
                for x in sides[side]
            )
            + "</div>"
            for side, word in (("worst", "Worst"), ("best", "Best"))
        )  # fmt: skip
        hidden = "" if position == 0 else " hidden"
        panes.append(f'<div data-tab="extreme-{e(name)}"{hidden}>{galleries}</div>')
    return (
        '<section id="extremes"><h2>Worst and best images</h2>'
        "<p class='note'>Of all measured images, by each metric that has a value for each of them."
        f'</p><div class="tabs" role="tablist">{"".join(tabs)}</div>{"".join(panes)}</section>'
    )


# ---------------------------------------------------------------------- charts and tables


def _charts(panels: Mapping[str, Panel]) -> str:
    figures = "".join(
        f"<figure><figcaption>{e(caption)}</figcaption>{svg(panel)}</figure>"
        for caption, panel in panels.items()
    )
    return f'<div class="charts">{figures}</div>'


def _curves(results: Mapping[str, Any]) -> str:
    by_tokens, by_bytes = charts.token_panels(results), charts.rate_panels(results)
    if not by_tokens and not by_bytes:
        return ""
    body = []
    if by_tokens:
        count = results["protocol"]["images"]["count"]
        of = f"On {counted(count, 'image')}, all that were measured."
        body.append(f"<h3>Against tokens</h3><p class='note'>{of}</p>")
        body.append(_charts({charts.title(k): panel for k, panel in by_tokens.items()}))
    if by_bytes:
        images = results["rates"]["images"]
        body.append(
            "<h3>Against bytes, with image codecs</h3><p class='note'>The tokenizer and the codecs "
            f"on the same set of {counted(images, 'image')}. Bytes of the tokenizer are its packed "
            "ids, without a "
            "header. Codecs: solid lines count the compressed data without headers, dashed lines "
            "whole files; a point is left out where some image does not fit.</p>"
        )
        body.append(_charts({charts.title(k): panel for k, panel in by_bytes.items()}))
        body.append(_rate_table(results))
    return f'<section id="curves"><h2>Quality and size</h2>{"".join(body)}</section>'


def _rate_table(results: Mapping[str, Any]) -> str:
    rates = results["rates"]
    names = charts.quality_names(rates["tokenizer"][-1])
    rows = [
        ["tokenizer", f"{row['num_tokens']} tokens", row["bytes"], *(row.get(n) for n in names)]
        for row in rates["tokenizer"]
    ]
    budget_bytes = {row["bytes"] for row in rates["tokenizer"]}
    for way, curves in rates["codecs"].items():
        for codec, points in curves.items():
            for p in points:
                if p["max_bytes"] in budget_bytes:
                    words = charts.COUNTED[way]
                    size = p[f"{way}_bytes"]
                    rows.append([charts.TITLES[codec], words, size, *(p.get(n) for n in names)])
    heads = ["", "counted", "bytes", *map(charts.title, names)]
    summary = "<summary>As a table, at the bytes of the tokenizer</summary>"
    return f"<details>{summary}{table(heads, rows)}</details>"


def _codes(results: Mapping[str, Any], measured: Path) -> str:
    codes = results.get("codes") or {}
    if not codes:
        return ""
    told = {
        "tokens counted, of each slot": codes["tokens"],
        "entropy of a token (bits)": codes["entropy"],
        "usage that uniform codes would have": codes["usage_expected"],
        "zlib on packed ids (share left)": codes["compression"]["zlib"],
        "zlib on shuffled ids (share left)": codes["compression"]["shuffled_zlib"],
    }
    if fit := (codes.get("zipf") or {}).get("1"):
        told["Zipf slope"], told["Zipf fit, R²"] = fit["slope"], fit["r2"]
    body = table(["", "value"], [[k, v] for k, v in told.items()])
    grams = [
        [f"{n}-gram", "", g["distinct"], g["count"], g["entropy"], g["conditional_entropy"],
         ((codes["zipf"].get(n) or {}).get("slope"))]
        for n, g in codes["ngrams"].items()
    ]  # fmt: skip
    heads = ["", "", "distinct", "counted", "entropy (bits)", "given those before", "Zipf slope"]
    maps = _effect_maps(codes, measured)
    return (
        '<section id="codes"><h2>Codes</h2>'
        f"<p class='note'>Ids of {counted(codes['images'], 'image')}. Entropies are plug-in "
        "estimates, too low where there are few tokens for each code; n-grams are of the first "
        "slot, in the order "
        f"of the tokens.</p>{_charts(charts.code_panels(codes))}{body}{table(heads, grams)}{maps}"
        "</section>"
    )


def _effect_maps(codes: Mapping[str, Any], measured: Path) -> str:
    path = measured / "effects.npz"
    if "effects" not in codes or not path.is_file():
        return ""
    with np.load(path, allow_pickle=False) as arrays:
        places, colors = arrays["places"], heat(arrays["maps"])
    chosen = np.unique(np.linspace(0, len(places) - 1, min(_SHOWN_MAPS, len(places))).round())
    figures = "".join(
        f"<figure><img alt='' src='{_encoded(colors[i])}'><figcaption>{places[i] + 1}</figcaption>"
        "</figure>"
        for i in chosen.astype(int)
    )
    return (
        "<h3>Which token moves which pixels</h3><p class='note'>Mean absolute change of the "
        "reconstruction when the token's id is exchanged for another one, over "
        f"{counted(codes['effects']['images'], 'image')}; all maps have one scale.</p>"
        f'<div class="maps">{figures}</div>'
    )


def _encoded(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _training(rows: Sequence[Mapping[str, float]]) -> str:
    panels = charts.training_panels(rows)
    if not panels:
        return ""
    return f'<section id="training"><h2>Training</h2>{_charts(panels)}</section>'


def _protocol(results: Mapping[str, Any]) -> str:
    rows = [[key, value] for key, value in leaves(results["protocol"])]
    around = [["checkpoint", results.get("checkpoint")]]
    around += [[f"model.{k}", v] for k, v in (results.get("model") or {}).items()]
    around += [[f"machine.{k}", v] for k, v in results["machine"].items()]
    around += [[k, results[k]] for k in ("skipped_images", "images_per_second") if k in results]
    return (
        '<section id="protocol"><h2>Protocol</h2>'
        "<p class='note'>All that the numbers depend on, the tokenizer aside. Numbers compare "
        "where this hash is the same: "
        f"<code>{results['protocol_hash']}</code></p>{facts(rows)}"
        f"<details><summary>Not in the hash: model and machine</summary>{facts(around)}</details>"
        "</section>"
    )
