"""Names of parts: each stands for one thing of its kind, and nothing keeps a list of them."""

import inspect
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from torch import nn

import vistok
from helpers import CONFIGS, ROOT
from vistok.core import registry
from vistok.core.errors import ConfigError
from vistok.core.registry import register, registered, resolve, with_names
from vistok.models.decoder import Decoder
from vistok.models.encoder import Encoder
from vistok.models.tokenizer import Tokenizer
from vistok.quantizers.base import Quantizer
from vistok.quantizers.vq import VectorQuantizer


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Forget what a test registers, and nothing that a module registers when it is imported."""
    for kind in registry._ARTICLES:
        registered(kind)
    for table in ("_registered", "_names"):
        copy = {kind: dict(names) for kind, names in getattr(registry, table).items()}
        monkeypatch.setattr(registry, table, copy)


def new(name="Mine"):
    return type(name, (nn.Module,), {"__module__": "somebodys", "__qualname__": name})


# ---------------------------------------------------------------------- registering


def test_a_class_has_a_name_or_its_path():
    mine, other = vistok.register("my_name")(new()), vistok.register(new("Other"))
    assert resolve("my_name") is resolve("somebodys.Mine") is mine
    assert resolve("somebodys.Other") is other
    assert registered()["somebodys.Other"] is other


def test_a_name_belongs_to_one():
    with pytest.raises(
        ConfigError, match=r"'vq' is vistok\.quantizers\.vq\.VectorQuantizer already"
    ):
        register("vq")(new())
    with pytest.raises(ConfigError, match=r"VectorQuantizer has the name 'vq' already"):
        register("my_vq")(VectorQuantizer)
    assert resolve("vq") is VectorQuantizer and "my_vq" not in registered()


def test_what_is_defined_anew_takes_the_place():
    """As in a notebook, whose cell runs again."""
    register("mine")(new())
    second = register("mine")(new())
    assert resolve("mine") is second
    third = register("renamed")(new())
    assert resolve("renamed") is resolve("somebodys.Mine") is third
    assert "mine" not in registered()


def test_kinds_have_names_of_their_own():
    def mine():
        pass

    mine.__module__, mine.__qualname__ = "somebodys", "mine"
    register("vq", kind="importer")(mine)
    assert resolve("vq", kind="importer") is mine and resolve("vq") is VectorQuantizer
    with pytest.raises(ConfigError, match=r"somebodys\.mine must be a class"):
        register("mine")(mine)


@pytest.mark.parametrize("name", ["", "my.name", "my name", "1st"])
def test_a_name_is_a_word(name):
    with pytest.raises(ConfigError, match="must be a name"):
        register(name)


# ---------------------------------------------------------------------- looking up


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("titokk", {}, r"^_target_=titokk: not in vistok's registry \(did you mean 'titok'\?\);"),
        ("vistok.models.titok.TiTok", {"key": "a._target_"}, r"^a\._target_=.* mean 'titok'\?"),
        ("maskgit_vqgan", {}, r"=maskgit_vqgan: is an importer, expected a part$"),
        (
            "vq",
            {"kind": "importer", "key": "source"},
            "^source=vq: is a part, expected an importer$",
        ),
        ("tatitok", {"kind": "importer"}, r"no such importer \(did you mean 'ta_titok'\?\); there"),
        (
            "nobodys_module.XyzXyz",
            {},
            r"registry; if it is your own, import its module first \(plugins=",
        ),
        (None, {}, "^_target_=null: not in"),
    ],
)
def test_an_unknown_name_gets_advice(target, options, message):
    with pytest.raises(ConfigError, match=message):
        resolve(target, **options)


LIGHT = """
import sys
import vistok.quantizers.vq
from vistok.core.registry import resolve
before = set(sys.modules)
assert resolve("vq") is resolve("vistok.quantizers.vq.VectorQuantizer")
assert set(sys.modules) == before
assert resolve("titok").__module__ == "vistok.systems.titok.model"
"""


def fresh(code, root=ROOT):
    """Output of a fresh interpreter with the package of a checkout."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tokenizers')\n{code}"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_name_at_hand_imports_nothing_and_another_is_found():
    fresh(LIGHT)


def test_paths_become_names():
    own = {"_target_": "my_module.Mine", "books": [{"_target_": "vistok.quantizers.fsq.FSQ"}]}
    named = {"_target_": "my_module.Mine", "books": [{"_target_": "fsq"}]}
    assert with_names({"a": own, "b": 1}) == {"a": named, "b": 1}


# ---------------------------------------------------------------------- completeness


def subclasses(cls):
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_part_that_can_be_built_has_a_name():
    parts = [c for base in (Encoder, Decoder, Quantizer, Tokenizer) for c in subclasses(base)]
    ours = [c for c in parts if c.__module__.startswith("vistok.") and not inspect.isabstract(c)]
    assert len(ours) > 30
    unnamed = [c.__name__ for c in ours if c not in registered().values()]
    assert not unnamed


def targets(config):
    if isinstance(config, dict):
        if "_target_" in config:
            yield config["_target_"]
        config = list(config.values())
    for value in config if isinstance(config, list) else ():
        yield from targets(value)


def test_configs_name_parts():
    seen = set()
    for path in CONFIGS.rglob("*.yaml"):
        if path.parent.name == "launcher":  # Hydra's own
            continue
        config = yaml.safe_load(path.read_text())
        for target in targets(config):
            known = target in registered() or target in registered("metric")
            assert known and "." not in target, f"{path}: {target}"
            seen.add(target)
    assert len(seen) > 40


BUILD = """
import json
import torch
import vistok.cli, vistok.help
from vistok.core.configuration import compose, options, to_container
from vistok.core.registry import registered
from vistok.models.build import build_tokenizer
built = {}
for name in options("tokenizer"):
    if name.endswith("_tiny"):
        with torch.device("meta"):
            config = to_container(compose("train", [f"experiment={name}"]))
            built[name] = type(build_tokenizer(config)).__name__
print(json.dumps([built, sorted(registered()), sorted(registered("importer"))]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", ["hita", "flextok"])
def test_a_system_goes_with_its_folder(system, tmp_path):
    """Nothing else knows of it: not a list, not the help, not another system."""
    for folder in ("tokenizers", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", f"{system}*")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    parts, importers = registered(), registered("importer")
    names = [f for f in ROOT.glob("configs/tokenizer/*_tiny.yaml") if not f.name.startswith(system)]
    built, left, left_importers = json.loads(fresh(BUILD, tmp_path))
    assert sorted(built) == sorted(f.stem for f in names)
    assert system not in built.values() and len(built) > 5
    gone = {name for name, cls in parts.items() if f"vistok.systems.{system}" in cls.__module__}
    # Other tests of this process may have registered parts of their own.
    ours = {name for name, cls in parts.items() if cls.__module__.startswith("vistok.")}
    assert gone and set(left) == ours - gone
    assert set(left_importers) == set(importers) - {system}
