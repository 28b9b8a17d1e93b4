"""The benchmark of a whole step: at most 1.15 times its parts, by operations, not by seconds."""

import importlib.util

import pytest

from helpers import ROOT, SIZES, TINY, needs_hed

SMALL = [word for word in TINY if word not in ("loss=mse", *SIZES["titok_tiny"])]
SMALL += ["tokenizer=vqgan_tiny", *SIZES["vqgan_tiny"]]
PATCH = ["loss.terms.adversarial.discriminator.base_channels=4"]
PATCH += ["loss.terms.adversarial.discriminator.num_layers=2"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", ROOT / "scripts/bench_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bench


def test_a_step_with_an_adversary_is_the_sum_of_its_parts(bench):
    found = bench([*SMALL, *PATCH], 1)
    assert found["flops_networks"] == 0 and found["flops_discriminator"] > 0
    assert 0.98 < found["flops_ratio"] < 1.15
    assert all(found[name] > 0 for name in ("whole", "without", "discriminator", "ratio_least"))


@needs_hed
@pytest.mark.parametrize("loss", ["mse_hed_vgg", "mse_gram"])
def test_a_step_with_a_perceptual_term_too(bench, loss):
    """Of two terms that look through one network each looks at what the other has seen."""
    found = bench([*SMALL, *PATCH, f"loss={loss}"], 0)
    assert found["flops_networks"] > found["flops_discriminator"]
    assert 0.98 < found["flops_ratio"] < 1.02


@needs_hed
def test_a_published_recipe_counts_from_the_start(bench):
    """Its discriminator starts late; the adaptive weight differentiates the last layer once more."""
    words = ["experiment=vqgan_f16", "adversary=vqgan", "loss/perceptual=hed_vgg"]
    found = bench([*words, *SMALL, *PATCH], 0)
    assert found["flops_discriminator"] > 0 and 0.98 < found["flops_ratio"] < 1.15
