"""Imports point down, heavy libraries stay where they belong, and our source root hides nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PATIENCE, ROOT

PACKAGE = ROOT / "tokenizers" / "vistok"

#: Floors from the bottom up. A module imports from lower ranks, or from its own folder; floors of
#: one rank never meet.
RANKS = {
    "core": 0,
    "nn": 1,
    "quantizers": 2,
    "metrics": 2,
    "data": 2,
    "models": 3,
    "systems": 4,
    "losses": 4,
    "priors": 4,
    "checkpoints": 5,
    "evaluation": 6,
    "training": 7,
    "tasks": 8,
    "export": 8,
    "tools": 8,
    "hf": 8,
    "help": 9,
    "starting": 9,
    "cli": 10,
    "__main__": 11,
}


def modules():
    return [(path, path.relative_to(PACKAGE).parts) for path in sorted(PACKAGE.rglob("*.py"))]


def layer_of(parts):
    return Path(parts[0]).stem


def imports(path):
    """(dotted module, line) of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node.lineno
            if node.module == "vistok":
                yield from ((f"vistok.{alias.name}", node.lineno) for alias in node.names)


def test_every_module_has_a_rank():
    layers = {layer_of(parts) for _, parts in modules()} - {"__init__"}
    assert layers == set(RANKS)


def test_imports_point_down():
    wrong, seen = [], 0
    for path, parts in modules():
        own = layer_of(parts)
        if own == "__init__":
            continue
        for name, line in imports(path):
            other = name.split(".")[1] if name.startswith("vistok.") else None
            if other is None or other not in RANKS or other == own:
                continue
            seen += 1
            if RANKS[other] >= RANKS[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {other}")
    assert not wrong, "\n".join(wrong)
    assert seen > 50  # else the walk sees nothing


def test_systems_do_not_import_each_other():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {name}"
        for path, parts in modules()
        if parts[0] == "systems" and len(parts) > 1
        for name, line in imports(path)
        if name.startswith("vistok.systems.") and name.split(".")[2] != Path(parts[1]).stem
    ]
    assert not wrong, "\n".join(wrong)


ALLOWED = {
    "lightning": ("training/", "tasks/", "data/datamodule.py", "data/token_module.py"),
    "hydra": ("starting.py", "core/configuration.py", "core/words.py"),
    "omegaconf": ("starting.py", "core/configuration.py", "evaluation/inputs.py"),
    "torchmetrics": ("metrics/",),
    "wandb": ("training/",),
    "timm": ("models/pretrained.py",),
    "h5py": ("models/networks/files.py",),
    "huggingface_hub": ("models/pretrained.py", "checkpoints/hub.py", "export/hub.py"),
    "matplotlib": ("evaluation/plots.py",),
    "rich": ("core/console.py", "training/", "tasks/", "evaluation/", "data/", "export/", "tools/"),
    "PIL": ("data/", "evaluation/", "tools/"),
}


@pytest.mark.parametrize("library", ALLOWED)
def test_library_stays_in_its_layer(library):
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path, _ in modules()
        for name, _ in imports(path)
        if name.split(".")[0] == library
    }
    strangers = [user for user in users if not user.startswith(ALLOWED[library])]
    assert not strangers
    assert users or library == "wandb"  # Lightning imports it for us


READERS = (
    ("models", "pretrained.py"),
    ("models", "networks", "files.py"),
    ("losses", "gan", "released.py"),
)


def test_quantizers_and_networks_need_torch_alone():
    allowed = set(sys.stdlib_module_names) | {"torch", "vistok"}
    for path, parts in modules():
        if layer_of(parts) in ("quantizers", "nn", "models", "systems", "losses", "priors"):
            for name, line in imports(path):
                # These need timm, safetensors and h5py once a run names a network or a file.
                if parts not in READERS:
                    assert name.split(".")[0] in allowed, f"{path}:{line} imports {name}"


@pytest.mark.parametrize("folder", ["tokenizers", "data", "configs", "scripts"])
def test_source_roots_are_no_packages(folder):
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()
    if folder == "configs":
        assert not list((ROOT / folder).rglob("*.py"))
    if folder == "tokenizers":
        inside = [p.name for p in (ROOT / folder).iterdir() if p.name != "__pycache__"]
        assert inside == ["vistok"]


def python(code: str, *argv: str, cwd: Path = ROOT, **environment: str) -> str:
    """Output of a fresh interpreter that starts in the checkout."""
    import os

    result = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


HUGGING_FACE = """
import sys
from pathlib import Path
root = Path.cwd()
# As train.py and `python train.py` leave it: source root first, then the checkout itself.
sys.path[:0] = [str(root / "tokenizers"), str(root)]
import tokenizers
assert tokenizers.Tokenizer and "site-packages" in tokenizers.__file__, tokenizers.__file__
import transformers
from transformers import PreTrainedTokenizerFast  # needs the real tokenizers
assert PreTrainedTokenizerFast.__module__.startswith("transformers.")
import vistok
assert Path(vistok.__file__).is_relative_to(root)
print("both")
"""


def test_hugging_face_works_beside_us():
    pytest.importorskip("transformers")
    assert python(HUGGING_FACE).endswith("both\n")


BLOCKED = [
    "lightning",
    "hydra",
    "omegaconf",
    "timm",
    "huggingface_hub",
    "torchmetrics",
    "matplotlib",
    "webdataset",
    "wandb",
    "rich",
    "PIL",
    "sklearn",
    "skimage",
    "yaml",
    "tensorboard",
    "simplejpeg",
]

LOAD = """
import sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None  # importing it raises
import torch
import vistok
tok = vistok.load(sys.argv[1])
images = torch.randint(0, 256, (2, tok.channels, *tok.image_size), dtype=torch.uint8)
ids = tok.tokenize(images)
assert ids.shape == (2, tok.num_tokens, 1) and ids.dtype == torch.int64
rec = tok.detokenize(ids)
assert rec.shape == images.shape and 0 <= rec.min() and rec.max() <= 1
assert [t.dtype for t in tok.codebooks()] == [torch.float32]
print("loaded")
"""


def test_loading_needs_torch_and_safetensors_alone(exported, finished_run):
    for place in (exported, finished_run):
        out = python(LOAD, str(place), ",".join(BLOCKED), PYTHONPATH=str(ROOT / "tokenizers"))
        assert out == "loaded\n"


def test_import_of_the_package_is_light():
    code = "import sys, vistok, vistok.cli, vistok.help; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    assert python(code, PYTHONPATH=str(ROOT / "tokenizers")) == "[]\n"


def test_losses_and_teachers_need_timm_only_once_a_network_is_built():
    code = (
        "import sys, vistok.losses.features, vistok.losses.alignment; print('timm' in sys.modules)"
    )
    assert python(code, PYTHONPATH=str(ROOT / "tokenizers")) == "False\n"
