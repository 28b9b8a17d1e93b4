"""scripts/house.py counts what a hand count gives."""

import importlib.util
import json
import sys

import pytest

from helpers import ROOT


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / "scripts" / "house.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


P = "tokenizers/vistok"

#: Two systems: `big` has a folder, `big_one` builds on it and is in one file.
FILES = {
    "configs/tokenizer/big_tiny.yaml": "_target_: big\nwidth: 8\nencoder:\n  cnn:\n    _target_: shared\n  _target_: big_encoder\n",
    "configs/tokenizer/big_one_tiny.yaml": "defaults:\n  - big_tiny\n  - _self_\n_target_: big_one\nwidth: 8 # as in big\n",
    "configs/experiment/big_tiny.yaml": "# Big.\nname: a\n",
    "configs/experiment/big_one_tiny.yaml": "# Big One.\nname: a\n",
    "configs/train.yaml": "name: a\n",
    f"{P}/nn/layers.py": "class Net:\n    def forward(self): pass\n",
    f"{P}/nn/own.py": "X = 1\n",
    f"{P}/nn/shared.py": """@register("shared")\nclass Shared:\n    pass\n""",
    f"{P}/systems/__init__.py": "",
    f"{P}/systems/big/__init__.py": '"""Big."""\n',
    f"{P}/systems/big/model.py": (
        "from vistok.nn.layers import Net\nfrom vistok.nn import own\n"
        '@register("big_encoder")\nclass Encoder(Net):\n    pass\n'
        '@register("big")\nclass Big:\n    pass\n'
    ),
    f"{P}/systems/big/weights.py": "import vistok.nn.shared\n",
    f"{P}/systems/big_one.py": '@register("big_one")\nclass BigOne:\n    pass\n',
    f"{P}/help.py": '"""Of big."""\nNAMES = "big_tiny"  # big_one\n',
    f"{P}/cli.py": "def f():\n    '''BigOne'''\n    return BigOne\n",
    f"{P}/checkpoints/migrate.py": "NAMES = {'x': 'big'}\n",
}


def test_a_small_house_by_hand(house):
    found = house.House(dict(FILES)).measure()
    big, one = found["systems"]["big"], found["systems"]["big_one"]
    # Of big_one: its file, cli.py that names it, and two configs. big's parts are its parts too.
    assert one == {
        "files": 4, "folders": 2, "mentions": 1, "own lines": 3, "hops": 4,
        "modules": [f"{P}/cli.py", f"{P}/systems/big_one.py"],
    }  # fmt: skip
    own = [f"{P}/systems/big/{name}.py" for name in ("__init__", "model", "weights")]
    assert big["modules"] == sorted([*own, f"{P}/help.py"])
    assert (big["files"], big["folders"], big["mentions"], big["own lines"]) == (6, 2, 1, 10)
    assert big["hops"] == 3  # tokenizer config, model.py, layers.py
    assert found["tree"]["longest"] == "systems/big/model.py (8)"
    assert found["configs"]["tokenizer"] == {"lines": 11, "repeated": 1}
    assert found["configs"]["experiment"] == {"lines": 2, "repeated": 1}


@pytest.fixture(scope="module")
def tree(house):
    return house.House(house.read_tree(None)).measure()


def test_the_working_tree_is_told_in_tables_and_json(house, tree, tmp_path, capsys):
    assert house.main(["--json", str(tmp_path / "house.json")]) == 0
    shown = capsys.readouterr().out
    assert json.loads((tmp_path / "house.json").read_text()) == {"working tree": tree}
    assert {"titok", "vqgan"} <= set(tree["systems"])
    assert all(f"| {name} " in shown for name in tree["systems"])
    both = house.tables({"a": tree, "b": tree})
    assert both.startswith("a → b\n") and "| titok " in both
    with pytest.raises(SystemExit, match="no_such_revision"):
        house.read_tree("no_such_revision")


def test_the_house_keeps_its_measure(house, tree):
    """The design allows no long file, and no module that needs to know of a system."""
    assert tree["tree"][f"above {house.LONG} lines"] == 0, tree["tree"]["longest"]
    mentions = {name: system["mentions"] for name, system in tree["systems"].items()}
    # MaskGIT's importer makes a VQGAN; transformers names Janus' network janus_vqgan.
    assert sum(mentions.values()) <= 2, mentions
