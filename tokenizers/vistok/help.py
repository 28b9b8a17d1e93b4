"""Help for people: what to type, and what there is to choose from; imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vistok.core.configuration import (
    config_dir,
    groups,
    header,
    notes,
    option_files,
    options,
    required,
)
from vistok.core.errors import ConfigError, nearest
from vistok.core.terminal import columns, counted, show, typed, wrapped

#: The groups that people choose from most, in this order; the others follow by name.
_FIRST = ("experiment", "tokenizer", "quantizer", "loss", "stage", "data", "logger")

#: How many experiments `train --help` describes.
_DESCRIBED = 3


def overview() -> None:
    """Print `vistok --help`."""
    commands = {
        "train [key=value ...]": "train a tokenizer, or resume=runs/<run>",
        "doctor [key=value ...]": "try out a training: memory, time, health",
        "eval run=runs/<run>": "metrics, metrics.json, report.html",
        "compare RUN RUN ...": "measured runs side by side",
        "report RUN": "report.html again, without measuring",
        "export run=runs/<run> out=FOLDER": "files for other programs",
        "tokenize model=FOLDER ...": "images to tokens, in the formats of trainers",
        "detokenize tokens=FOLDER ...": "tokens to pictures",
        "vocabulary model=FOLDER ...": "a text tokenizer with the codes behind its ids",
        "near-codes model=FOLDER ...": "neighbors of each code; which ids survive",
        "import-weights source=NAME ...": "released weights to an export",
        "list [GROUP [WORD]]": "what there is to choose from",
        "make-shards IMAGES out=FOLDER": "images to WebDataset shards",
        "check-shards FOLDER": "shards against their manifest",
        "bench-data [SHARDS]": "speed of the data stream",
    }
    _show(
        "vistok: an open training framework for discrete visual tokenizers",
        columns((f"vistok {words}", about) for words, about in commands.items()),
        wrapped(
            "Each takes --help. In a checkout, uv run train.py, uv run eval.py and the scripts in "
            "scripts/ are the same commands."
        ),
    )


def train_help() -> None:
    """Print `train.py --help`, which fits one screen."""
    train = typed("train")
    start = {
        train: "the default run: minutes on a CPU",
        f"{train} data=folder data.train=FOLDER": "your own images",
        f"{train} resume=runs/<run>": "continue a run",
        f"{train} init_from=runs/<run>": "fine-tune it, on your own data or at another size",
    }
    keys = {
        "trainer.max_steps=2000": "optimizer steps",
        "trainer.devices=8": "number of GPUs or CPU processes",
        "trainer.precision=bf16": "bf16, 16, 32 or auto",
        "data.image_size=128": "pixels, or [height,width]",
        "data.batch_size=64": "images per device",
        "quantizer.codebook_size=4096": "number of codes",
        "optimizer.lr=3e-4": "learning rate",
        "seed=1": "seed of weights and data order",
    }
    more = {
        f"{typed('list')} GROUP [WORD]": "GROUP: experiments, tokenizers, quantizers, losses, "
        "data, ...; WORD: in a name or its notes",
        "--multirun quantizer=vq,fsq": "one run for each combination",
        "--cfg job": "print the config: every key there is",
        "--config-dir FOLDER": "configs of your own; or VISTOK_CONFIG_DIR",
        "debug=true": "show the traceback of an error",
    }
    _show(
        "Train a discrete visual tokenizer, or continue a run.",
        f"  {train} [key=value ...]",
        "Start with\n" + columns(start.items()),
        "Experiments (experiment=NAME), minutes on a CPU\n" + _experiments(),
        "Main keys, for example\n" + columns(keys.items()),
        "More\n" + columns(more.items()),
    )


def _experiments() -> str:
    """Return the tiny experiments, the default one first; only the first few with their notes."""
    texts = {n: header(p) for n, p in option_files("experiment").items() if n.endswith("_tiny")}
    names = sorted(texts, key=lambda name: (not texts[name].startswith("Default"), name))
    first, others = names[:_DESCRIBED], names[_DESCRIBED:]
    rows = columns((name, texts[name]) for name in first)
    more = wrapped(f"and {', '.join(others)}", "  ", "  ", most=2)
    return f"{rows}\n{more}" if others else rows


def eval_help() -> None:
    """Print `eval.py --help`."""
    program = typed("eval")
    examples = {
        f"{program} run=runs/<run>": "on the validation images of that run",
        f"{program} run=runs/<run> eval=full": "more metrics, token statistics, codecs",
        f"{program} model=exported/mine data=folder data.val=FOLDER": "an export",
        f"{program} data.val=FOLDER images=FOLDER": "what another program wrote",
        f"{program} run=runs/<run> 'eval.num_tokens=[1,8,64]'": "curves over token budgets",
    }
    keys = {
        "run=": "a run folder, an export folder or a checkpoint; or model=, or images=",
        "eval=default": f"the suite: {', '.join(options('eval'))}",
        "out=": "where to write; empty: <run>/eval, or <export>_eval",
        "weights=ema": "ema (averaged) or last",
        "device=auto": "auto, cpu or cuda",
        "precision=auto": "auto, bf16, 16 or 32",
        "batch_size=64": "images per batch",
        "num_pictures=12": "number of images in the picture; picture_scale= enlarges it",
        "eval.num_tokens=": "token budgets (flexible length), measured next to image codecs",
        "eval.steps=": "of a decoder that samples; likewise eval.guidance= and eval.seed=",
        "data.*": "as in training, for example data.val=/photos/val data.val_crop=tv_center",
        "prior.*": "of a prior: num_samples, images, tokenizer, guidance, ...",
        "plugins=": "modules of your own to import first",
        "debug=true": "show the traceback of an error",
    }
    _show(
        wrapped(
            "Evaluate a tokenizer by a hashed protocol: a table, metrics.json, per_image.csv and "
            "report.html."
        ),
        f"  {program} run=runs/<run> [key=value ...]",
        "Examples\n" + columns(examples.items()),
        "Keys\n" + columns(keys.items()),
    )


def export_help() -> None:
    """Print `export.py --help`."""
    keys = {
        "run=": "a run folder or a checkpoint",
        "out=": "folder to write, for example exported/my_tokenizer",
        "weights=ema": "ema (averaged) or last",
        "layout=": f"files for the original's code instead: {', '.join(_named('exporter'))}",
        "license=": "of the weights, for the card, such as apache-2.0",
        "push=": "owner/name: also upload it to the Hugging Face Hub",
        "overwrite=false": "true: replace an export",
        "plugins=": "modules of your own to import first",
        "debug=true": "show the traceback of an error",
    }
    _show(
        "Export a tokenizer for other programs: codebooks, weights, a config and a card.",
        f"  {typed('export')} run=runs/<run> out=FOLDER [key=value ...]",
        "Keys\n" + columns(keys.items()),
        wrapped(
            'vistok.load("FOLDER") reads it back; the codebooks can be read with safetensors alone.'
        ),
    )


def config_help(name: str) -> None:
    """Print the `--help` of a command by its schema, `configs/NAME.yaml`."""
    path = config_dir() / f"{name.replace('-', '_')}.yaml"
    rows = []
    for line in path.read_text().splitlines():
        if match := re.match(r"(\w+): (\S+)(?:\s+# (.*))?$", line):
            key, value, about = match.groups()
            value = "" if value == "???" else value
            rows.append((f"{key}={value}", about or "show the traceback of an error"))
    needed = " ".join(f"{key}=..." for key in required(name.replace("-", "_")))
    _show(
        wrapped(" ".join(notes(path))),
        f"  {typed(name)} {needed} [key=value ...]",
        "Keys\n" + columns(rows),
    )


def import_help() -> None:
    """Print `import_weights.py --help`."""
    program = typed("import-weights")
    keys = {
        "source=": ", ".join(["auto", *_named("importer")]),
        "weights=": "a .safetensors, .bin or .pth file; it is read without running code",
        "out=": "folder to write, for example exported/my_tokenizer",
        "config=": "the authors' config, JSON or YAML, for what tensors do not say",
        "image_size=": "for weights that take any size (published: 256)",
        "overwrite=false": "true: replace an export",
        "plugins=": "modules of your own to import first",
        "debug=true": "show the traceback of an error",
    }
    _show(
        "Turn weights that others released into an export.",
        f"  {program} source=NAME weights=FILE out=FOLDER ...",
        "Keys\n" + columns(keys.items()),
        "Then, for example\n"
        f"  {typed('eval')} run=FOLDER data=shards data.val=/sets/val-000000.tar",
    )


def _named(kind: str) -> list[str]:
    """Return the names of importers or exporters, read off their sources, which take torch."""
    pattern = rf'@register\("(\w+)", kind="{kind}"\)'
    sources = (Path(__file__).parent / "systems").rglob("*.py")
    return sorted(n for p in sources for n in re.findall(pattern, p.read_text("utf-8")))


def list_help() -> None:
    """Print `vistok list --help`, which names the groups."""
    _groups((), "List the configs to choose from.")


def listing(words: Sequence[str], folders: Sequence[Path] = ()) -> None:
    """Print the configs of a group, those that mention all further words, or all of one.

    Args:
        words: a group in the singular or plural, then words of a name or description.
        folders: folders of configs in addition to ours and VISTOK_CONFIG_DIR.

    Raises:
        ConfigError: if there is no such folder or group, or no config mentions the words.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such config folder")
    if not words:
        return _groups(folders, "")
    group, many = _group_of(words[0], groups(folders))
    files = dict(sorted(option_files(group, folders).items()))
    wanted = [word.lower() for word in words[1:]]
    texts = {name: f"{name} {' '.join(notes(path))}".lower() for name, path in files.items()}
    found = [name for name in files if all(word in texts[name] for word in wanted)]
    if len(wanted) == 1 and words[1] in files:
        found = [words[1]]
    if not found:
        hint = nearest(words[-1], files)
        raise ConfigError(f"{' '.join(words[1:])}: no {group} mentions this{hint}")
    choice = f"+{group}" if group == "debug" else group
    if len(found) == 1:
        return _show(f"{choice}={found[0]}", _wrapped_notes(notes(files[found[0]])))
    _show(
        f"{counted(len(found), 'config')}; choose one with {choice}=NAME",
        columns((name, header(files[name])) for name in found),
        f"{typed('list')} {many} NAME shows all notes on one of them.",
    )


def _wrapped_notes(lines: Iterable[str]) -> str:
    """Wrap notes, in which a line goes on until one ends with a full stop; commands stay whole."""
    texts: list[str] = []
    goes_on = False
    for line in map(str.rstrip, lines):
        command = line.lstrip().startswith("train.py") or (goes_on and texts[-1].endswith("\\"))
        if command or not goes_on:
            texts.append(line)
        else:
            texts[-1] += f" {line.strip()}"
        goes_on = line.endswith("\\") if command else not line.endswith((".", ":"))
    whole = ("train.py", " ")
    return "\n".join(f"  {t}" if t.startswith(whole) else wrapped(t, "  ", "  ") for t in texts)


def _groups(folders: Sequence[Path], title: str) -> None:
    known = groups(folders)
    order = [*(g for g in _FIRST if g in known), *(g for g in known if g not in _FIRST)]
    rows = [(_plural(g), counted(len(options(g, folders)), "config")) for g in order]
    _show(
        title,
        f"  {typed('list')} GROUP [WORD ...] [--config-dir FOLDER]",
        "Groups\n" + columns(rows),
        wrapped(
            f"For example, {typed('list')} quantizers entropy lists the quantizers whose name or "
            "notes mention entropy."
        ),
    )


def _group_of(word: str, known: Iterable[str]) -> tuple[str, str]:
    """Return a group and its plural, by either."""
    plurals = {group: _plural(group) for group in known}
    for group, many in plurals.items():
        if word.lower() in (group, many):
            return group, many
    there = ", ".join(plurals.values())
    raise ConfigError(f"{word}: no such group{nearest(word, plurals.values())}; there are: {there}")


def _plural(group: str) -> str:
    if group.endswith("y"):
        return f"{group[:-1]}ies"
    if group.endswith("ss"):
        return f"{group}es"
    return group if group in ("data", "debug", "callbacks") else f"{group}s"


def _show(*parts: str) -> None:
    show("\n\n".join(filter(None, parts)))
