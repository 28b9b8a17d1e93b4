"""The keys of a config that are not arguments of parts: what each may be. Light.

Parts (tokenizer, quantizer, terms of the objective) say it in their constructors' annotations;
`registry.build` holds a config to those. All other keys stand here, once, and are held to it
before anything is imported that takes its time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from vistok.core.errors import ConfigError, as_written, nearest
from vistok.core.geometry import as_pair, grid_of
from vistok.core.memory import fits_in_memory
from vistok.core.values import (
    Count,
    Decay,
    ImageSize,
    Index,
    NonNegative,
    Positive,
    Rule,
    Share,
    filled_list,
    is_number,
    is_whole,
    number,
    rule_of,
)

_MISSING = object()


def or_null(annotation: Any) -> Any:
    """Return the annotation of values that may be null as well."""
    return annotation | None


def up_to(most: int, least: int = 1) -> Rule:
    """Return the rule of whole numbers from `least` to `most`."""
    return Rule(f"a whole number, {least} to {most}", lambda v: is_whole(v) and least <= v <= most)


_Seed = Annotated[int, up_to(2**32 - 1, 0)]
_Steps = Annotated[int, up_to(2**53)]
_Words = Annotated[Sequence[str], Rule("a list of words", lambda v: _are_words(v))]
Names = Annotated[
    Sequence[str], Rule("a list of words, or one", lambda v: isinstance(v, str) or _are_words(v))
]
_beta = rule_of(Decay)
_Betas = Annotated[Sequence[float], filled_list(Decay, "two numbers, 0 or more and below 1", (2,))]
_Devices = Annotated[
    Any,
    Rule(
        "auto, a number of devices, or a list of their numbers",
        lambda v: (
            (is_whole(v) and (v == -1 or 1 <= v <= 2**16))
            or (isinstance(v, str) and (v == "auto" or v.replace(",", "").isdigit()))
            or (isinstance(v, list) and bool(v) and all(is_whole(d) and d >= 0 for d in v))
        ),
    ),
]
_Batches = Annotated[
    Any,
    Rule(
        "a number of batches, 1 or more, or a share of them above 0 and up to 1.0",
        lambda v: (is_whole(v) and v >= 1) or (is_number(v) and 0 < v <= 1),
    ),
]
_Range = Annotated[
    Any,
    Rule(
        "[LOW, HIGH], the values that are black and white, for example [0, 1], or null",
        lambda v: (
            v is None
            or (
                (isinstance(v, (list, tuple)) and len(v) == 2 and all(map(is_number, v)))
                and v[0] < v[1]
            )
        ),
    ),
]
_Places = Annotated[
    Any,
    Rule(
        "a path, a list of paths, or null",
        lambda v: v is None or isinstance(v, str) or is_number(v) or (_are_words(v) and bool(v)),
    ),
]


def _are_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)


def precision(*more: str) -> Any:
    """Return the annotation of a precision; `more` are names of older configs."""
    known = ("auto", "bf16", "16", "32", *more)
    return Annotated[
        Any,
        Rule(
            "one of auto, bf16, 16, 32",
            lambda v: isinstance(v, (str, int)) and not isinstance(v, bool) and str(v) in known,
            known[:4],
        ),
    ]


#: By group: the keys with what they may be, and the value of one that a run of an older version
#: does not have. A key without such a value must be there.
TRAIN: dict[str, dict[str, Any]] = {
    "": {
        "task": (str, "reconstruction"),
        "tokens": (str | None, None),
        "name": (str, "run"),
        "seed": _Seed,
        "resume": (str | None, None),
        "init_from": (str | None, None),
        "init_parts": (or_null(Names), None),
        "init": (Literal["data", "random"], "data"),
        "init_images": (Count, 1024),
        "compile": (bool, False),
        "plugins": (Names, []),
        "overwrite": (bool, False),
        "debug": (bool, False),
    },
    "ema": {"decay": Decay},
    "trainer": {
        "accelerator": Literal["auto", "cpu", "gpu", "cuda"],
        "devices": (_Devices, "auto"),
        "num_nodes": (Annotated[int, up_to(2**16)], 1),
        "strategy": (Literal["auto", "ddp", "ddp_unused", "fsdp2"], "auto"),
        "timeout": (
            Annotated[
                float,
                Rule(
                    "a number of seconds, above 0 and up to 1e7",
                    lambda v: is_number(v) and 0 < v <= 1e7,
                ),
            ],
            600,
        ),
        "global_batch_size": (or_null(Annotated[int, up_to(2**31)]), None),
        "precision": precision("bf16-mixed", "16-mixed", "32-true"),
        "matmul_precision": (Literal["highest", "high", "medium"], "highest"),
        "max_steps": _Steps,
        "val_check_interval": _Steps,
        "limit_val_batches": (_Batches, 1.0),
        "accumulate_grad_batches": (Annotated[int, up_to(2**20)], 1),
        "gradient_clip_val": (or_null(NonNegative), None),
        "log_every_n_steps": (_Steps, 10),
        "deterministic": (bool | Literal["warn"], False),
        "enable_progress_bar": (bool, True),
    },
    "optimizer": {
        "lr": NonNegative,
        "lr_rule": (Literal["absolute", "linear", "sqrt"], "absolute"),
        "betas": _Betas,
        "weight_decay": NonNegative,
        "warmup_samples": Index,
        "total_samples": or_null(Count),
        "final_lr_factor": Share,
        "on_extend": (Literal["hold", "stretch", "rewarm"], "hold"),
    },
    "callbacks": {
        "checkpoint_every": _Steps,
        "keep_last": (Annotated[int, up_to(10_000)], 2),
        "background_checkpoints": (bool, True),
        "num_pictures": Annotated[int, up_to(10_000, 0)],
        "report": (bool, True),
        "picture_scale": (or_null(Annotated[int, up_to(64)]), None),
        "codebook_window": _Steps,
        "max_skipped_steps": (_Steps, 20),
        "health_every": (_Steps, 100),
        "winning_accuracy": (Share, 0.97),
        "winning_windows": (_Steps, 5),
    },
    "logger": {
        "name": Literal["jsonl", "tensorboard", "wandb", "csv"],
        "project": (str | None, None),
        "offline": (bool | None, None),
    },
    "baseline": {
        "patch_size": Annotated[
            Any,
            Rule(
                "a whole number, 1 or more; baseline=null for none",
                lambda v: v is None or (is_whole(v) and v >= 1),
            ),
        ],
        "num_patches": (Annotated[int, up_to(10**9)], 100_000),
        "iterations": (Annotated[int, up_to(10**6)], 25),
    },
    "stage": {
        "name": str,
        "proxy": (str | None, None),
        "autoencoder": (str | None, None),
        "weights": (str | None, None),
        "frozen": (or_null(Names), []),
    },
    "data": {
        "kind": str,
        "train": _Places,
        "val": _Places,
        "val_fraction": number(0, 1),
        "image_size": ImageSize,
        "channels": Count,
        "batch_size": Annotated[int, up_to(2**24)],
        "eval_batch_size": (or_null(Annotated[int, up_to(2**24)]), None),
        "num_workers": (or_null(Annotated[int, up_to(1024, 0)]), None),
        "shuffle_buffer": (or_null(Count), None),
        "seed": Index,
        "train_crop": str,
        "val_crop": str,
        "augment": _Words,
        "split_shards": (bool, False),
        "sources": (dict | None, None),
        "resample": (bool, False),
        "fields": (_Words, []),
        "max_skipped_share": (Share, 0.01),
        "scaled_decode": (bool, True),
        "crop_scale": (
            Annotated[Any, filled_list(Share, "[least, largest], both in (0, 1]", (2,))],
            [0.08, 1.0],
        ),
        "buckets": (list | None, None),
        "cache_dir": (str | None, None),
        "cache_gb": (Positive, 100.0),
        "retries": (Annotated[int, up_to(10**6, 0)], 5),
        "timeout": (Positive, 30.0),
        "value_range": (_Range, None),
        "max_pixels": (Count, 180_000_000),
    },
}

#: The data of priors, in the place of those of images.
TOKENS: dict[str, Any] = {
    "kind": Literal["tokens"],
    "val": (str | None, None),
    "val_fraction": number(0, 1),
    "batch_size": Annotated[int, up_to(2**24)],
    "eval_batch_size": (or_null(Annotated[int, up_to(2**24)]), None),
    "num_workers": (Annotated[int, up_to(1024, 0)], 0),
    "shuffle_buffer": (or_null(Count), None),
    "seed": Index,
    "tokenizer": (str | None, None),
}

#: Groups that may be null or missing.
_OPTIONAL = ("baseline", "stage")

#: Groups that take further keys: of Lightning's Trainer, and of the DataModule, which check them.
_OPEN = ("", "trainer", "data")

#: Keys of Lightning's Trainer that vistok sets itself, with what to set instead.
OWN_TRAINER_KEYS = {
    "max_epochs": "runs are counted in steps; set trainer.max_steps",
    "min_epochs": "runs are counted in steps; set trainer.max_steps",
    "max_time": "set trainer.max_steps",
    "check_val_every_n_epoch": "set trainer.val_check_interval, in steps",
    "num_sanity_val_steps": "there are none",
    "callbacks": "they are the task's",
    "logger": "choose logger=wandb or logger=tensorboard",
    "plugins": "modules of your own are named by plugins=[...]",
    "default_root_dir": "set hydra.run.dir",
    "enable_checkpointing": "set callbacks.checkpoint_every",
    "enable_model_summary": "there is none",
    "use_distributed_sampler": "the data are spread by vistok",
}


def check_keys(config: dict[str, Any], schema: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold a config to a schema, and give keys that an older one lacks their values, in place.

    Args:
        config: plain containers, resolved.
        schema: by group its keys.

    Raises:
        ConfigError: naming the full key that is wrong, missing, or not one.
    """
    for group, keys in schema.items():
        part = config if not group else config.get(group, _MISSING)
        if part in (None, _MISSING) and group in _OPTIONAL:
            continue
        if part is _MISSING:
            raise ConfigError(f"{group} is missing; it is a group of keys: {', '.join(keys)}")
        if not isinstance(part, dict):
            names = " or ".join(f"{group}.{key}" for key in list(keys)[:2])
            raise ConfigError(f"{group}={as_written(part)}: must be a group of keys; set {names}")
        prefix = f"{group}." if group else ""
        for key, wanted in keys.items():
            annotation, default = wanted if isinstance(wanted, tuple) else (wanted, _MISSING)
            rule = rule_of(annotation)
            value = part.get(key, default)
            if value is _MISSING:
                words = rule.words if rule else "a value"
                raise ConfigError(f"{prefix}{key} is missing; it must be {words}")
            if rule is not None and not rule.test(value):
                raise ConfigError(rule.complaint(f"{prefix}{key}", value))
            part.setdefault(key, value)
        if group not in _OPEN:
            for key in part:
                if key not in keys:
                    raise ConfigError(f"{prefix}{key}: no such key{nearest(str(key), keys)}")


def check_run(config: dict[str, Any]) -> None:
    """Check the keys of a run's config, in place; those of parts are the registry's.

    Raises:
        ConfigError: naming the key.
    """
    is_prior = config.get("task") == "prior"
    for group in ("prior", "sampling") if is_prior else ("tokenizer", "quantizer", "loss"):
        if not isinstance(config.get(group), dict):
            found = as_written(config.get(group))
            raise ConfigError(f"{group}={found}: must be a group of keys")
    data = config.get("data")
    kind = data.get("kind") if isinstance(data, dict) else None
    if is_prior and kind != "tokens":
        raise ConfigError(f"data.kind={as_written(kind)}: task=prior reads tokens; add data=tokens")
    if kind == "tokens" and not is_prior:
        raise ConfigError("data.kind=tokens: is for task=prior; a tokenizer reads images")
    check_keys(config, {**TRAIN, "data": TOKENS} if is_prior else TRAIN)
    for key in config["data"] if is_prior else ():
        if key not in TOKENS:
            raise ConfigError(f"data.{key}: no such key{nearest(str(key), TOKENS)}")
    for key, instead in OWN_TRAINER_KEYS.items():
        if key in config["trainer"]:
            raise ConfigError(f"trainer.{key}: {instead}")


def check_sizes(config: Mapping[str, Any]) -> None:
    """Compare the sizes of images, patches and batches with each other and the memory here.

    Raises:
        ConfigError: naming the key.
    """
    data = config["data"]
    if "image_size" not in data:  # tokens
        return
    height, width = as_pair(data["image_size"])
    encoder = config["tokenizer"].get("encoder")
    if isinstance(encoder, dict) and encoder.get("image_size") == data["image_size"]:
        patch = encoder.get("patch_size")
        if is_whole(patch) and patch > 0:
            grid_of(data["image_size"], patch)
    for key in ("batch_size", "eval_batch_size"):
        if data[key]:
            shape = f"{data['channels']} x {height} x {width} px"
            size = data[key] * data["channels"] * height * width * 4  # as float32
            fits_in_memory(size, f"data.{key}={data[key]}: a batch of images of {shape}")
