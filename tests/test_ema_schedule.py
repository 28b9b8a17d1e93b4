"""The average of the weights, the optimizer's groups, the learning rate."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers import tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.training.ema import EMA, AveragedWeights
from vistok.training.optimizers import build_optimizer, parameter_groups, warmup_cosine


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[2].bias.requires_grad_(False)
    return net


def scramble(net):
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.normal_()
        net[1].running_mean.normal_()
        net[1].num_batches_tracked += 1


def test_ema_is_the_formula():
    net = network()
    ema = EMA(net, 0.6)
    expected = {n: p.detach().double().clone() for n, p in net.named_parameters()}
    for n in range(1, 30):
        scramble(net)
        ema.update()
        decay = min(0.6, (1 + n) / (10 + n))
        for name, p in net.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    weights = ema.weights()
    for name, value in expected.items():
        assert torch.allclose(weights[name].double(), value, atol=1e-6), name
    assert not torch.allclose(weights["0.weight"], net[0].weight, atol=1e-3)


def test_ema_copies_buffers_and_leaves_frozen_parameters():
    net = network()
    ema = EMA(net, 0.9)
    for _ in range(3):
        scramble(net)
        ema.update()
    weights = ema.weights()
    assert weights.keys() == net.state_dict().keys()
    assert torch.equal(weights["1.running_mean"], net[1].running_mean)
    assert (
        weights["1.num_batches_tracked"] == 3
        and weights["1.num_batches_tracked"].dtype == torch.int64
    )
    assert torch.equal(weights["2.bias"], net[2].bias) and "2.bias" not in ema.shadow


def test_averages_and_parameters_are_exchanged():
    net = network()
    ema = EMA(net, 0.9)
    scramble(net)
    ema.update()
    live, averaged = copy.deepcopy(net.state_dict()), copy.deepcopy(ema.weights())
    places = {name: p.data_ptr() for name, p in net.named_parameters()}
    with torch.inference_mode():  # in which Lightning validates
        ema.swap()
    assert not torch.equal(live["0.weight"], averaged["0.weight"])
    assert all(torch.equal(v, averaged[k]) for k, v in net.state_dict().items())
    with pytest.raises(RuntimeError, match="saved"):
        ema.state_dict()
    ema.swap()
    assert all(torch.equal(v, live[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, averaged[k]) for k, v in ema.weights().items())
    assert places == {name: p.data_ptr() for name, p in net.named_parameters()}
    net[0](torch.randn(5, 3)).sum().backward()  # nothing of the inference mode is left


def test_an_exception_puts_the_parameters_back():
    module = nn.Module()
    module.model, module.ema = network(), None
    callback = AveragedWeights()
    callback.on_validation_start(None, module)  # a module without averages stays as it is
    callback.on_exception(None, module, KeyboardInterrupt())
    module.ema = EMA(module.model, 0.9)
    scramble(module.model)
    live = copy.deepcopy(module.model.state_dict())
    for end in (False, True, False):
        callback.on_validation_start(None, module)
        assert module.ema.swapped
        assert not torch.equal(module.model[0].weight, live["0.weight"])
        if end:
            callback.on_validation_epoch_end(None, module)
        callback.on_exception(None, module, KeyboardInterrupt())
        assert not module.ema.swapped
        assert all(torch.equal(v, live[k]) for k, v in module.model.state_dict().items())


def test_ema_state_round_trip_and_reset():
    net = network()
    ema = EMA(net, 0.9)
    for _ in range(3):
        scramble(net)
        ema.update()
    other = EMA(copy.deepcopy(net), 0.9)
    other.load_state_dict(ema.state_dict())
    for e in (ema, other):
        scramble_seeded(e.module)
        e.update()
    assert all(torch.equal(v, other.shadow[k]) for k, v in ema.shadow.items())
    ema.reset()
    assert ema.num_updates == 0
    assert all(torch.equal(ema.shadow[n], p) for n, p in net.named_parameters() if p.requires_grad)


def scramble_seeded(net):
    torch.manual_seed(7)
    scramble(net)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_ema_decay_in_range(decay):
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        EMA(network(), decay)


# ---------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("tokenizer", ["titok_tiny", "vqgan_tiny"])
def test_every_trainable_parameter_is_in_one_group(tokenizer):
    module = tiny_tokenizer("quantizer.codebook=gradient", tokenizer=tokenizer)
    module.encoder.requires_grad_(False)
    next(module.encoder.parameters()).requires_grad_(True)
    groups = parameter_groups(module, 0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in module.parameters() if p.requires_grad}


def test_only_weights_of_linear_layers_and_convolutions_decay():
    module = tiny_tokenizer("quantizer.codebook=gradient")
    groups = parameter_groups(module, 0.1)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    by_name = {name: decays[id(p)] for name, p in module.named_parameters()}
    assert by_name["encoder.patch_embed.weight"] == by_name["decoder.smooth.weight"] == 0.1
    for name, decay in by_name.items():
        free = ("bias", "norm", "positions", "token", "means", "codebook", "gain")
        if any(word in name for word in free):
            assert decay == 0, name
    assert {0.0, 0.1} == set(by_name.values())


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="no trainable"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), 1e-3, (0.9, 0.99), 0.0)


def steps_of(optimizer, net, count):
    torch.manual_seed(count)
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()


def test_the_fused_step_is_adamw():
    """One pass over memory or one per operation: the same weights, also by a resumed state."""
    nets = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    ours = [build_optimizer(net, 1e-2, (0.9, 0.95), 0.1) for net in nets[::2]]
    plain = torch.optim.AdamW(
        parameter_groups(nets[1], 0.1), lr=1e-2, betas=(0.9, 0.95), foreach=False, fused=False
    )
    assert all(group["fused"] for group in ours[0].param_groups)
    steps_of(ours[0], nets[0], 20)
    steps_of(plain, nets[1], 20)
    # A run that was made parameter by parameter goes on fused.
    nets[2].load_state_dict(nets[1].state_dict())
    ours[1].load_state_dict(copy.deepcopy(plain.state_dict()))
    assert all(group["fused"] for group in ours[1].param_groups)
    assert not any(group["fused"] for group in plain.state_dict()["param_groups"])
    for optimizer, net in zip((ours[0], plain, ours[1]), nets, strict=True):
        steps_of(optimizer, net, 5)
    for a, b, c in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(b, c, atol=1e-5)


def test_only_a_cpu_steps_fused():
    """On a GPU a fused step would unscale the gradients of fp16 after they are clipped."""
    here = build_optimizer(nn.Linear(6, 2), 1e-2, (0.9, 0.95), 0.1)
    with torch.device("meta"):
        there = build_optimizer(nn.Linear(6, 2), 1e-2, (0.9, 0.95), 0.1)
    assert [group["fused"] for group in there.param_groups] == [None, None]
    there.load_state_dict(here.state_dict())
    assert [group["fused"] for group in there.param_groups] == [None, None]
    assert not getattr(here, "_step_supports_amp_scaling", False)  # what Lightning asks


# ---------------------------------------------------------------------- schedule


def test_warmup_cosine_values():
    def factor(samples):
        return warmup_cosine(samples, warmup=100, total=1100, final=0.1)

    assert [factor(s) for s in (0, 25, 50, 99)] == pytest.approx([0, 0.25, 0.5, 0.99])
    assert factor(100) == 1
    assert factor(350) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(600) == pytest.approx(0.55)
    assert factor(1100) == pytest.approx(0.1) == factor(10**9)
    values = [factor(s) for s in range(100, 1101)]
    assert all(a > b for a, b in zip(values, values[1:], strict=False))


def test_warmup_cosine_at_the_edges():
    assert warmup_cosine(0, 0, 100, 0.0) == 1
    assert warmup_cosine(100, 0, 100, 0.0) == pytest.approx(0)
    assert warmup_cosine(5, 10, 10, 0.5) == 0.5
    assert warmup_cosine(10, 10, 10, 0.5) == 1 or warmup_cosine(10, 10, 10, 0.5) == 0.5
    assert warmup_cosine(50, 0, 100, 1.0) == 1
