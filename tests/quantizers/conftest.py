import copy
import functools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from vistok.core import registry

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "quantizer").glob("*.yaml"))
DIM = 32  # latent width that the shipped configs are built with here


@pytest.fixture(autouse=True)
def _reproducible():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: threads would mostly wait for each other
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _composed(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(overrides=[f"+quantizer={name}", f"+tokenizer.latent_dim={DIM}"])


def load_config(name, **overrides):
    """The config of `quantizer=name` on a tokenizer of width DIM; a fresh copy."""
    composed = copy.deepcopy(_composed(name))
    for key, value in overrides.items():
        composed.quantizer[key] = value
    return composed.quantizer


def build(name, codebook_size=256, **overrides):
    """The quantizer of a shipped config; learned codebooks are cut down to `codebook_size`."""
    node = load_config(name, **overrides)
    if "codebook_size" in node:
        node.codebook_size = min(node.codebook_size, codebook_size)
        if "inner" in node and "codebook_size" in node.inner:
            node.inner.codebook_size = node.codebook_size
        if "delta" in node:
            node.delta = min(node.delta, codebook_size)
    return registry.build(OmegaConf.to_container(node, resolve=True))


def total_loss(quantizer, output):
    """The weighted sum that a trainer minimises."""
    losses = (quantizer.loss_weights[name] * loss for name, loss in output.losses.items())
    return sum(losses, torch.zeros(()))


def train(quantizer, batches, masks=None, lr=1e-3):
    """One optimizer step per batch of latents, with a decoder that wants small outputs."""
    quantizer.train()
    params = list(quantizer.parameters())
    optimizers = [torch.optim.Adam(params, lr)] if params else []
    for number, latents in enumerate(batches):
        output = quantizer(latents, None if masks is None else masks[number])
        loss = total_loss(quantizer, output) + 0.01 * output.quantized.square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        quantizer.after_step(optimizers)
    return quantizer


def state(quantizer):
    return copy.deepcopy(quantizer.state_dict())


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key
