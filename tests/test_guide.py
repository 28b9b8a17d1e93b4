"""docs/add_a_tokenizer.md, followed to the letter: inside a checkout, and outside of one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PATIENCE, ROOT, SIZES, TINY, make_photos, needs_lite0, smallest

pytestmark = needs_lite0

GUIDE = (ROOT / "docs" / "add_a_tokenizer.md").read_text()
FENCE = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILES = dict(FENCE.findall(GUIDE))
NAME = "gridvit"
MODEL, TOKENIZER, EXPERIMENT = list(FILES)[1:]


def commands(section):
    """The commands that the guide shows under a heading."""
    text = GUIDE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


#: What makes the guide's run one of a few seconds; `{photos}` and the sizes are filled in.
WORDS = [word for word in TINY if word not in SIZES["titok_tiny"] and word != "loss=mse"]

#: Runs commands one after the other, then looks at what came out.
FOLLOW = """
import json, sys
from pathlib import Path

import torch

given = json.loads(Path(sys.argv[1]).read_text())
from vistok.cli import main
for command in given["commands"]:
    sys.argv = ["vistok", *command]
    print("$", *command, flush=True)
    code = main(command)
    assert code == 0, (command, code)
    print(flush=True)

import vistok
from vistok.core.configuration import load_run_config, to_container
from vistok.models.term import Step
from vistok.tasks.reconstruction import Reconstruction

run, out = map(Path, given["folders"])
losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
losses = [row["loss/semantic"] for row in losses if "loss/semantic" in row]
assert len(losses) == 4 and all(0 < loss < 2 for loss in losses), losses
assert json.loads((run / "eval" / "metrics.json").read_text())["psnr"] > 5

images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
timm = [sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "timm"]
sys.modules["timm"] = None  # importing it raises: nothing that is loaded needs the teacher
tok = vistok.load(out)
assert type(tok).__name__ == "GridViT" and tok.encoder.grid == (2, 2)
assert tok.decoder.heads == {"image": "pixels"}
ids = tok.tokenize(images)
assert ids.shape == (3, 4, 1) and torch.equal(vistok.load(run).tokenize(images), ids)
assert tok.detokenize(ids).shape == images.shape
del sys.modules["timm"]

# The head alone: it reaches all of the tokenizer but the pixels, and learns.
torch.manual_seed(0)
task = Reconstruction(to_container(load_run_config(run)))
tokenizer, objective = task.tokenizer.train(), task.objective
assert not any("teacher" in name for name in tokenizer.state_dict())
assert tokenizer.state_dict().keys() == tok.state_dict().keys()
x = tokenizer.to_model_range(images)
optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
found = []
for _ in range(40):
    loss = objective(Step(x, tokenizer(x, objective.taps), tokenizer))["semantic"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    found.append(loss.item())
for name, parameter in [*tokenizer.encoder.named_parameters(), *tokenizer.decoder.named_parameters()]:
    assert (parameter.grad is not None) == (not name.startswith("pixels")), name
assert tokenizer.decoder.semantic.weight.grad.any() and tokenizer.encoder.embed.weight.grad.any()
assert found[-1] < 0.5 * found[0], (found[0], found[-1])
print("followed")
"""


def python(*words, cwd, path):
    """Output of a fresh interpreter in a folder, with modules from `path`."""
    variables = {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **variables, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE * 2,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout


def follow(shown, folder, photos, sizes, path):
    """Run the guide's commands for `vistok` in a folder; its train command with tiny words."""
    own, folders = [], {}
    for command in shown:
        command = command[2:] if command[:2] == ["uv", "run"] else command
        if command[0].endswith(".py"):
            command[0] = Path(command[0]).stem
        elif command.pop(0) != "vistok":
            continue
        words = dict(word.partition("=")[::2] for word in command)
        folders |= {k: words[k] for k in ("hydra.run.dir", "out") if k in words}
        if command[0] == "train":
            command += [
                *WORDS,
                *sizes,
                "data=folder",
                f"data.train={photos}",
                "data.val_fraction=0.2",
            ]
        if command[0] == "eval":
            command += ["num_pictures=2", "device=cpu", "precision=32"]
        own.append(command)
    assert [command[0] for command in own] == ["list", "train", "eval", "export"]
    (folder / "given.json").write_text(
        json.dumps({"commands": own, "folders": list(folders.values())})
    )
    (folder / "follow.py").write_text(FOLLOW)
    out = python("follow.py", "given.json", cwd=folder, path=path)
    assert out.endswith("followed\n") and "GridViT (2D, a ViT with rotary positions)" in out
    return out


def files_of(root):
    return {
        path.relative_to(root): path.read_text()
        for folder in ("tokenizers", "configs")
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in (".py", ".yaml")
    }


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the guide builds on, without the system."""
    root = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "assets")
    for folder in ("tokenizers", "configs", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.fixture
def inside(checkout):
    """That copy with the guide's files."""
    for path, text in FILES.items():
        (checkout / path).parent.mkdir(exist_ok=True)
        (checkout / path).write_text(text)
    return checkout


def test_one_folder_and_two_configs():
    paths = [Path(path) for path in FILES]
    assert [path.name for path in paths[:2]] == ["__init__.py", "model.py"]
    assert paths[0].parent == paths[1].parent == Path(f"tokenizers/vistok/systems/{NAME}")
    assert [str(path.parent) for path in paths[2:]] == ["configs/tokenizer", "configs/experiment"]
    assert not [path for path, text in files_of(ROOT).items() if NAME in f"{path} {text}".lower()]


@pytest.mark.slow
def test_inside_a_checkout_and_gone_again(inside, tmp_path):
    photos, path = make_photos(tmp_path / "photos"), [inside / "tokenizers"]
    sizes = smallest(f"{NAME}_tiny", inside / "configs")
    follow(commands("4. Use it"), inside, photos, sizes, path)
    listing = "from vistok.cli import main; main(['train', '--help']); main(['list', 'tokenizers'])"
    assert python("-c", listing, cwd=inside, path=path).count(f"{NAME}_tiny") == 2

    removed = [command for command in commands("4. Use it") if command[0] == "rm"]
    assert len(removed) == 2
    for command in removed:
        subprocess.run(command, cwd=inside, check=True)
    assert files_of(inside) == files_of(ROOT)
    everything = "from vistok.core.registry import registered; print(*registered())"
    listing = python("-c", f"{listing}; {everything}", cwd=inside, path=path)
    assert NAME not in listing and "titok_tiny" in listing


@pytest.mark.slow
def test_outside_a_checkout(tmp_path):
    configs = tmp_path / "my_configs"
    for path in (TOKENIZER, EXPERIMENT):
        place = configs / Path(path).relative_to("configs")
        place.parent.mkdir(parents=True)
        place.write_text(FILES[path])
    (tmp_path / f"{NAME}.py").write_text(FILES[MODEL])
    photos, shown = make_photos(tmp_path / "photos"), commands("Outside the checkout")
    sizes = smallest(f"{NAME}_tiny", configs)
    # The module is in the folder that the commands run in, and `import` finds it there.
    follow(shown, tmp_path, photos, sizes, [ROOT / "tokenizers"])
    load = "import vistok; vistok.load('exported/mine')"
    with pytest.raises(AssertionError, match="import its module first"):
        python("-c", load, cwd=tmp_path, path=[ROOT / "tokenizers"])
    python("-c", f"import {NAME}; {load}", cwd=tmp_path, path=[ROOT / "tokenizers"])


@pytest.mark.slow
def test_the_shared_tests_take_it(inside):
    (command,) = [c for c in commands("4. Use it") if "pytest" in c]
    assert command == ["uv", "run", "pytest", "-k", NAME]
    files = ("configs", "models", "taps", "sharding", "calls", "registry", "words", "cli")
    words = [*command[3:], "-v", "-n0", "-p", "no:cacheprovider"]
    out = python(
        "-m", "pytest", *words, *(f"tests/test_{n}.py" for n in files), cwd=inside, path=[]
    )
    passed = {line.split()[0].partition("::")[2] for line in out.splitlines() if " PASSED" in line}
    for name in (
        "test_an_empty_batch",
        "test_a_model_of_any_precision_tokenizes_and_paints",
        "test_all_that_is_declared_is_offered",
        "test_every_block_with_attention_is_gathered_by_itself",
        "test_experiment_builds_on_the_meta_device",
    ):
        assert f"{name}[{NAME}_tiny]" in passed, out[-3000:]
    assert len([name for name in passed if name.startswith("test_every_pair_")]) > 3
    assert "failed" not in out
