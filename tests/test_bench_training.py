"""The benchmark of training steps counts what is done, and its textbook is the same network."""

import importlib.util
import math

import pytest
import torch

from helpers import ROOT

SIZES = [
    *("data.image_size=16", "quantizer.codebook_size=16", "quantizer.codebook_dim=8"),
    *("tokenizer.encoder.num_latent_tokens=4", "tokenizer.encoder.class_token=true"),
    "tokenizer.decoder.class_token=true",
    *(f"tokenizer.{part}.{size}" for part in ("encoder", "decoder") for size in ("width=32", "num_heads=2")),
]  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "scripts/bench_training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case(precision, *words):
    keys = {"experiment": "titok_tiny", "precision": precision, "batch": 3, "device": "cpu"}
    return {**keys, "parts": True, "overrides": [*SIZES, *words]}


@pytest.fixture(autouse=True)
def products():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["32", "32+medium", "bf16"])
def test_the_step_consists_of_the_products_that_are_timed_by_themselves(bench, precision):
    calls, facts = bench.ours(case(precision))
    parts = {name: call() for name, call in calls.items()}
    # All but the convolution over the seams: three channels, 3 x 3, forward and both gradients.
    smooth = 3 * 2 * 3 * 16 * 16 * 3 * 3 * 9
    assert 0 < facts["flops"] - facts["own_flops"] < 1.02 * smooth  # edges count a little more
    # The names of the parts say what was multiplied, and how often.
    flops = 0
    for name in parts["own"]:
        size, _, count = name.split(" ", 2)[2].removesuffix(" times").rpartition(", ")
        flops += 2 * int(count) * math.prod(int(n) for n in size.split(" x "))
    assert flops == facts["own_flops"]
    assert {"aten::mm", "aten::addmm", "aten::gelu"} < set(parts["operators"])


def test_the_textbook_is_titok(bench):
    """As many parameters and operations; ours leaves out what nobody reads in the last blocks."""
    whole = {}
    for depth in (1, 2):
        words = [f"tokenizer.{part}.depth={depth}" for part in ("encoder", "decoder")]
        calls, plain = bench.textbook(case("textbook", *words))
        calls["step"]()
        whole[depth] = plain["flops"], bench.ours(case("32", *words))[1]["flops"]
    theirs, ours = (b - a for a, b in zip(whole[1], whole[2], strict=True))
    assert theirs == pytest.approx(ours, rel=1e-6)  # one block more on each side
    assert 0.6 * whole[1][0] < whole[1][1] < whole[1][0]
    assert bench.is_titok("titok_tiny", []) and not bench.is_titok("gigatok_tiny", [])


def test_the_table_has_a_line_for_each_contender(bench, capsys):
    others = {"textbook": {"step": 2.0}}
    rows = [
        bench.row(
            {**case("32"), "precision": p}, {"step": s}, {"flops": 1e9, "peak_mib": 1.0}, others
        )
        for p, s in (("32", 0.5), ("textbook", 2.0))
    ]
    lines = bench.table(rows).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["32", "textbook"]
    compiled = bench.row(case("32+compile"), {"step": 1.0}, {"flops": 1e9}, {})
    assert compiled["precision"] == "32+compile"
    assert bench.longest({"a": 0.001, "b": 0.002}).splitlines()[2:4] == [
        "| b | 2.0 |",
        "| a | 1.0 |",
    ]
    assert len(lines) == 4 and "| 4.00 |" in lines[2] and "| 1.00 |" in lines[3]
    assert bench.main(["nonsense"]) == 2 and "expected key=value" in capsys.readouterr().err
