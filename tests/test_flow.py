"""FlexTok: who sees whom, the flow and its sampler, guidance, what dropped tokens become."""

import math

import pytest
import torch

from helpers import awake, config_of, images_of, tiny_tokenizer
from vistok.core.errors import ConfigError
from vistok.models.build import build_tokenizer
from vistok.models.latent_vit import LatentTransformerEncoder, prefix_causal_mask
from vistok.nn.blocks import Attention, ModulatedBlock, SwiGLU
from vistok.nn.flow import Guidance, integrate, mix, time_features
from vistok.nn.patches import unpatchify
from vistok.systems.flextok.decoder import FlowDecoder
from vistok.systems.flextok.encoder import FlexTokEncoder


def decoder(**options):
    torch.manual_seed(0)
    settings = {"null_probability": 0.1, "steps": 3, "guidance": 1.0, **options}
    return awake(FlowDecoder([16, 24], 3, 8, 6, 12, 16, 2, 2, **settings)).eval()


# ---------------------------------------------------------------------- the start


def test_registers_reach_the_patches_from_the_first_step():
    """Otherwise Adam would make steps of full size out of an encoder's gradients of chance."""
    torch.manual_seed(0)
    net = FlowDecoder([16, 24], 3, 8, 6, 12, 16, 2, 2, guidance=1.0)
    noisy, time = torch.randn(2, 3, 16, 24), torch.tensor([0.3, 0.9])
    quantized = torch.randn(2, 6, 12, requires_grad=True)
    features = net.features(noisy, time, net.registers(quantized))
    (gradient,) = torch.autograd.grad((features * torch.randn_like(features)).sum(), quantized)
    assert gradient.abs().mean() > 1e-3
    x, condition = torch.randn(2, 12, 16), torch.randn(2, 16)
    assert torch.equal(net.blocks[1](x, condition, 6), x)  # AdaLN-Zero
    opened = x + net.blocks[0].attn(net.blocks[0].norm1(x))
    assert torch.allclose(net.blocks[0](x, condition, 6), opened, atol=1e-6)


def test_content_decides_how_much_of_the_latents_differs_between_images():
    images = images_of(32).float() / 127.5 - 1
    spreads = []
    for content in (0.125, 1.0):
        torch.manual_seed(0)
        net = LatentTransformerEncoder(16, 3, 8, 4, 32, 1, 2, content=content)
        net.initialize(images)
        spreads.append(net(images).std(dim=0).mean().item())
    assert spreads[1] > 2 * spreads[0], spreads


# ---------------------------------------------------------------------- who sees whom


def encoder(causal, kind=FlexTokEncoder):
    torch.manual_seed(0)
    return kind(16, 3, 8, 5, 16, 2, 2, causal=causal).eval()


def moved(net, change):
    """Which latents a change moves, `(K,)` bool."""
    images = torch.randn(2, 3, 16, 16)
    before = net(images).detach()
    with torch.no_grad():
        change(net)
    return ~torch.isclose(net(images), before, atol=1e-6).all(dim=2).all(dim=0)


@pytest.mark.parametrize("kind", [FlexTokEncoder, LatentTransformerEncoder])
@pytest.mark.parametrize("j", [0, 2, 4])
def test_a_causal_register_moves_itself_and_later_ones_only(j, kind):
    def change(net):
        net.latent_tokens[0, j] += 5 * torch.randn(16)

    assert moved(encoder(True, kind), change).tolist() == [i >= j for i in range(5)]
    assert moved(encoder(False, kind), change).all()


@pytest.mark.parametrize("kind", [FlexTokEncoder, LatentTransformerEncoder])
def test_what_the_first_block_sees(kind):
    """Patches at their places and registers, as they are (FlexTok) or normalized."""
    torch.manual_seed(0)
    net = kind(16, 3, 8, 5, 16, 1, 2, class_token=False)
    images, seen = torch.randn(2, 3, 16, 16), []
    net.transformer.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    net(images)
    patches = [images[:, :, y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
    patches = torch.stack([p.movedim(1, 3).flatten(1) for p in patches], dim=1)
    patches = net.patch_embed(patches) + net.patch_positions
    registers = (net.latent_tokens + net.latent_positions).expand(2, -1, -1)
    sequence = torch.cat([patches, registers], dim=1)
    assert torch.allclose(
        seen[0], sequence if kind is FlexTokEncoder else normed(sequence), atol=1e-5
    )


def test_registers_see_every_patch():
    net = encoder(True)
    images = torch.randn(1, 3, 16, 16)
    for y, x in ((0, 0), (0, 8), (8, 0), (8, 8)):
        other = images.clone()
        other[:, :, y : y + 8, x : x + 8] += 3
        assert not torch.isclose(net(other), net(images), atol=1e-6).all(dim=2).any()


def test_the_mask_by_its_definition():
    mask = prefix_causal_mask(3, 4)
    for row in range(7):
        for column in range(7):
            patch_row, patch_column = row < 3, column < 3
            expected = patch_column or (not patch_row and column <= row)
            assert mask[row, column] == expected


def test_blocks_of_flextok():
    torch.manual_seed(0)
    attention = Attention(16, 2, qk_norm=True, bias=False)
    x = torch.randn(2, 5, 16)
    before = attention(x)
    with torch.no_grad():  # the length of queries and keys does not count
        attention.qkv.weight[:32] *= 7
    assert torch.allclose(attention(x), before, atol=1e-4)
    mlp = SwiGLU(24)
    assert sum(p.numel() for p in mlp.parameters()) == 3 * 24 * 64
    gate, up = mlp.gate_up.weight[:64], mlp.gate_up.weight[64:]
    y = torch.randn(3, 24)
    expected = (torch.sigmoid(y @ gate.T) * (y @ gate.T) * (y @ up.T)) @ mlp.down.weight.T
    assert torch.allclose(mlp(y), expected, atol=1e-5)


def test_modulated_blocks_start_as_the_identity_and_tell_the_parts_apart():
    torch.manual_seed(0)
    block = ModulatedBlock(16, 2)
    for p in block.modulations.parameters():
        torch.nn.init.zeros_(p)
    x, condition = torch.randn(2, 7, 16), torch.randn(2, 16)
    assert torch.equal(block(x, condition, 4), x)
    for part, rows in ((0, slice(0, 4)), (1, slice(4, 7))):
        with torch.no_grad():
            block.modulations[part].bias.normal_()
        same = torch.isclose(block(x, condition, 4), x).all(dim=2).all(dim=0)
        assert not same[rows].any() and same.sum() == 7 - (rows.stop - rows.start)
        torch.nn.init.zeros_(block.modulations[part].bias)
    awake(block.modulations)
    assert not torch.allclose(block(x, condition, 4), block(x, condition + 1, 4), atol=1e-3)


def normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def test_a_modulated_block_by_its_definition():
    """AdaLN-Zero of DiT: a SiLU and a linear map of the condition for each part of the sequence."""
    block = awake(ModulatedBlock(16, 2)).double()
    x, condition = torch.randn(2, 7, 16).double(), torch.randn(2, 16).double()
    silu = condition * torch.sigmoid(condition)
    parts = [silu @ net.weight.T + net.bias for net in block.modulations]
    rows = torch.stack([parts[int(place >= 4)] for place in range(7)], dim=1)
    gate1, gate2, shift1, scale1, shift2, scale2 = rows.split(16, dim=2)
    y = x + gate1 * block.attn(normed(x) * (1 + scale1) + shift1)
    y = y + gate2 * block.mlp(normed(y) * (1 + scale2) + shift2)
    assert torch.allclose(block(x, condition, 4), y, atol=1e-10)


# ---------------------------------------------------------------------- the flow


@pytest.mark.parametrize("steps", [1, 2, 7, 25])
def test_the_sampler_integrates_a_straight_field_exactly(steps):
    """The field of one datum, (x - data) / s, leads from any noise to it along a line."""
    data, noise = torch.randn(2, 3, 3, 4, 4).unbind(0)
    times = []

    def velocity(x, time):
        times.append(time[0].item())
        return (x - data) / time.view(-1, 1, 1, 1)

    assert torch.allclose(integrate(velocity, noise, steps), data, atol=1e-5)
    assert times == pytest.approx([1 - i / steps for i in range(steps)])


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_the_sampler_is_eulers(steps):
    x = torch.randn(3, 5)
    shrunk = integrate(lambda x, s: x, x, steps)
    assert torch.allclose(shrunk, x * (1 - 1 / steps) ** steps, atol=1e-5)
    moved_by = integrate(lambda x, s: s[:, None].expand_as(x), x, steps)  # the sum of its times
    assert torch.allclose(moved_by, x - (steps + 1) / (2 * steps), atol=1e-5)


def test_the_path_and_its_velocity():
    data, noise = torch.randn(2, 3, 2, 4, 4).unbind(0)
    assert torch.equal(mix(data, noise, torch.zeros(3)), data)
    assert torch.equal(mix(data, noise, torch.ones(3)), noise)
    time = torch.tensor([0.1, 0.5, 0.9])
    slope = (mix(data, noise, time + 1e-3) - mix(data, noise, time)) / 1e-3
    assert torch.allclose(slope, noise - data, atol=5e-3)


def test_training_predicts_the_velocity_of_its_own_path():
    net = decoder()
    images, quantized = torch.randn(4, 3, 16, 24), torch.randn(4, 6, 12)
    torch.manual_seed(9)
    image = net(quantized, images)["image"]
    prediction, target = image.value, image.target
    torch.manual_seed(9)
    time, noise = torch.sigmoid(torch.randn(4)), torch.randn_like(images)
    assert torch.equal(target, noise - images)
    x = (1 - time.view(-1, 1, 1, 1)) * images + time.view(-1, 1, 1, 1) * noise
    assert torch.allclose(prediction, net.velocity(x, time, net.registers(quantized)), atol=1e-6)
    assert not torch.allclose(prediction, net.velocity(x, time * 0.5, net.registers(quantized)))


def test_an_image_predicted_gives_the_velocity_to_it():
    net = decoder(predicts="image")
    quantized, noise = torch.randn(2, 6, 12), net.noise(2, 0)
    with torch.no_grad():
        registers = net.registers(quantized)
        time = torch.tensor([0.3, 1.0])
        patches = net.head(net.features(noise, time, registers))
        image = unpatchify(patches, (2, 3), 8)
        velocity = net.velocity(noise, time, registers)
        assert torch.allclose(noise - time.view(2, 1, 1, 1) * velocity, image, atol=1e-4)
        # From pure noise one step leads to what is predicted there.
        first = unpatchify(net.head(net.features(noise, torch.ones(2), registers)), (2, 3), 8)
        assert torch.allclose(net.reconstruct(quantized, steps=1), first, atol=1e-4)
        image = net(quantized, torch.zeros_like(noise))["image"]
        prediction, target = image.value, image.target
        assert torch.equal(target, torch.zeros_like(noise)) and prediction.any()
    with pytest.raises(ConfigError, match="predicts=noise"):
        decoder(predicts="noise")


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("steps", [8, 25, 100])
def test_sampling_arrives_at_an_image_that_is_predicted_everywhere(steps, guidance):
    net = decoder(predicts="image")
    data = torch.randn(2, 3, 16, 24)
    net.output = lambda noisy, time, registers, taps: data
    found = net.reconstruct(torch.randn(2, 6, 12), steps=steps, guidance=guidance)
    assert torch.allclose(found, data, atol=1e-5)


@pytest.mark.parametrize("steps", [8, 100])
def test_plain_guidance_of_predicted_images_arrives_at_the_guided_image(steps):
    net = decoder(predicts="image", apg=False)
    own, null = torch.randn(2, 2, 3, 16, 24).unbind(0)
    registers = net.registers(torch.zeros(2, 6, 12))

    def output(noisy, time, given, taps=None):
        return own if torch.equal(given, registers) else null

    net.output = output
    found = net.reconstruct(torch.zeros(2, 6, 12), steps=steps, guidance=2.5)
    assert torch.allclose(found, null + 2.5 * (own - null), atol=1e-4)


def test_patches_and_time_on_their_way_to_the_head():
    """Patches at their places before the registers, and a last norm that the time modulates."""
    net, seen = decoder(), []
    net.blocks[0].register_forward_hook(lambda b, i, o: seen.append(i[0]))
    net.blocks[-1].register_forward_hook(lambda b, i, o: seen.append(o))
    noisy, time = torch.randn(2, 3, 16, 24), torch.tensor([0.3, 0.9])
    registers = net.registers(torch.randn(2, 6, 12))
    found = net.features(noisy, time, registers)
    patches = [noisy[:, :, y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8, 16)]
    patches = torch.stack([p.movedim(1, 3).flatten(1) for p in patches], dim=1)
    first = torch.cat([net.patch_embed(patches) + net.patch_positions, registers], dim=1)
    assert torch.allclose(seen[0], first, atol=1e-5)
    condition = net.time_embed(time_features(time, 256, 4.0792))
    shift, scale = net.modulate_out(condition * torch.sigmoid(condition)).split(16, dim=1)
    expected = normed(seen[1][:, :6]) * (1 + scale[:, None]) + shift[:, None]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("slowest", [1, 0.5])
def test_times_turn_at_frequencies_from_the_slowest_to_256_times_it(slowest):
    times = torch.tensor([0.0, 0.3, 1.0])
    features = time_features(times, 8, slowest)
    for row, time in enumerate(times.tolist()):
        angles = [time * slowest * 256 ** (i / 4) for i in range(4)]
        expected = [*map(math.cos, angles), *map(math.sin, angles)]
        assert features[row].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["tiny", "d12_d12", "d18_d18", "d18_d28"])
def test_256_features_turn_at_up_to_1000_radians(name):
    net = config_of(f"experiment=flextok_{name}")["tokenizer"]["decoder"]
    with torch.device("meta"):
        built = FlowDecoder([16, 24], 3, 8, 6, 12, 16, 1, 2, **{k: net[k] for k in ("time_dim", "slowest_time")})  # fmt: skip
    assert built.time_embed[0].weight.shape == (16, 256)
    fastest = torch.tensor([1e-3])  # the last sine, of a time that turns it by one radian
    feature = time_features(fastest, built.time_dim, built.slowest_time)[0, -1]
    assert feature.item() == pytest.approx(math.sin(1), abs=1e-4)


def test_the_decoder_sees_the_time_by_its_features():
    settings = {"time_dim": 10, "slowest_time": 3.0}
    net, seen = decoder(**settings), []
    net.time_embed.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    time = torch.tensor([0.3, 0.9])
    net.features(torch.randn(2, 3, 16, 24), time, net.registers(torch.randn(2, 6, 12)))
    assert torch.equal(seen[0], time_features(time, 10, 3.0)) and seen[0].shape == (2, 10)
    for bad in ({"time_dim": 7}, {"time_dim": 0}, {"slowest_time": -1}, {"slowest_time": "fast"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            decoder(**bad)


def test_times_are_told_apart():
    features = time_features(torch.linspace(0, 1, 50), 32)
    distances = torch.cdist(features, features) + 9 * torch.eye(50)
    assert features.shape == (50, 32) and distances.min() > 0.3


# ---------------------------------------------------------------------- guidance


def euler(net, registers, noise, steps, field):
    x = noise
    for i in range(steps):
        s = torch.full((len(x),), 1 - i / steps)
        x = x - field(net.velocity(x, s, registers), x, s) / steps
    return x


def test_guidance_of_one_is_none():
    net = decoder()
    quantized = torch.randn(2, 6, 12)
    with torch.no_grad():
        plain = euler(net, net.registers(quantized), net.noise(2, 5), 4, lambda v, x, s: v)
        assert torch.allclose(net.reconstruct(quantized, steps=4, guidance=1, seed=5), plain)
        guided = net.reconstruct(quantized, steps=4, guidance=3.0, seed=5)
    assert not torch.allclose(guided, plain, atol=1e-3)
    c, u = torch.randn(2, 3, 3, 4, 4).unbind(0)
    for apg in (False, True):
        assert torch.equal(Guidance(1.0, apg)(c, u), c)


@pytest.mark.parametrize(("guidance", "calls"), [(1, 4), (3.0, 8)])
def test_without_guidance_each_step_asks_once(guidance, calls):
    net, asked = decoder(), []
    net.blocks[0].register_forward_hook(lambda b, i, o: asked.append(1))
    with torch.no_grad():
        net.reconstruct(torch.randn(2, 6, 12), steps=4, guidance=guidance)
    assert len(asked) == calls


def test_plain_guidance_by_its_formula():
    net = decoder(apg=False)
    quantized = torch.randn(2, 6, 12)
    with torch.no_grad():
        null = net.null.expand(2, 6, -1)

        def field(v, x, s):
            u = net.velocity(x, s, null)
            return u + 2.5 * (v - u)

        expected = euler(net, net.registers(quantized), net.noise(2, 1), 3, field)
        found = net.reconstruct(quantized, guidance=2.5, seed=1)
    assert torch.allclose(found, expected, atol=1e-4)


def test_projected_guidance():
    torch.manual_seed(0)
    c, u = torch.randn(2, 3, 2, 4, 4).unbind(0)
    guide = Guidance(7.5, True, momentum=-0.5, threshold=2.5)
    first = guide(c, u)
    push = (first - c) / 6.5
    assert (push * c).flatten(1).sum(1).abs().max() < 1e-4  # nothing parallel
    assert (push.flatten(1).norm(dim=1) <= 2.5 + 1e-4).all()
    # The second step sees the difference less half of the first.
    c2, u2 = torch.randn(2, 3, 2, 4, 4).unbind(0)
    difference = (c2 - u2) - 0.5 * (c - u)
    fresh = Guidance(7.5, True, threshold=2.5)(c2, c2 - difference)
    assert torch.allclose(guide(c2, u2), fresh, atol=1e-5)
    # Below the threshold the orthogonal part is kept as it is.
    small = Guidance(2.0, True)(c, c - 1e-2 * u) - c
    flat_c, flat_u = c.flatten(1), 1e-2 * u.flatten(1)
    along = (flat_c * flat_u).sum(1, keepdim=True) / flat_c.square().sum(1, keepdim=True)
    assert torch.allclose(small.flatten(1), flat_u - along * flat_c, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null_probability": 1.5}, "null_probability=1.5: must be a number, 0 to 1"),
        ({"null_probability": -0.1}, "null_probability=-0.1"),
        ({"null_probability": float("nan")}, "null_probability=nan"),
        ({"null_probability": 0.0, "guidance": 7.5}, "guidance=7.5: needs an unconditional branch"),
        ({"null_probability": 0, "guidance": 0}, "guidance=0: needs an unconditional branch"),
        ({"guidance": float("nan")}, "guidance=nan: must be a finite number, 0 or more"),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"guidance": -1}, "guidance=-1"),
        ({"guidance": "7"}, "guidance='7'"),
        ({"steps": 2.5}, "steps=2.5: must be a whole number, 1 or more"),
        ({"steps": "3"}, "steps='3'"),
        ({"steps": 0}, "steps=0"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"seed": "a"}, "seed='a'"),
    ],
)
def test_what_no_sampling_can_take_is_refused(options, message):
    name = message.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{name}=") as error:
        decoder(**options)
    assert ("unconditional" in message) == ("unconditional" in str(error.value))
    trained = {"null_probability": options.pop("null_probability", 0.1)}
    if not options or trained["null_probability"] not in (0, 0.1):
        return  # said of training alone
    with pytest.raises(ConfigError) as error:
        decoder(**trained).reconstruct(torch.zeros(1, 6, 12), **options)
    assert str(error.value).startswith(message.replace("'", ""))


def test_without_an_unconditional_branch_there_is_no_guidance_but_sampling():
    quantized = torch.zeros(3, 6, 12)
    assert decoder(null_probability=0).reconstruct(quantized, guidance=1).shape == (3, 3, 16, 24)
    assert decoder().reconstruct(quantized, guidance=0).isfinite().all()  # the other branch alone
    for seed in (torch.tensor([0.5, 1, 2]), 2**63):
        with pytest.raises(ConfigError, match=r"^seed=.*whole number"):
            decoder().reconstruct(quantized, seed=seed)


def test_the_null_token_takes_the_place_of_all_registers():
    images = torch.randn(400, 3, 16, 24)
    shares = []
    for probability in (0.0, 0.3, 1.0):
        net = decoder(null_probability=probability).train()
        quantized = torch.randn(400, 6, 12, requires_grad=True)
        torch.manual_seed(1)
        net(quantized, images)["image"].value.square().sum().backward()
        untouched = (quantized.grad == 0).flatten(1).all(dim=1)
        shares.append(untouched.float().mean().item())
        assert (net.null.grad is not None and net.null.grad.abs().max() > 0) == (probability > 0)
    deviation = math.sqrt(0.3 * 0.7 / 400)
    assert shares[0] == 0 and shares[2] == 1 and abs(shares[1] - 0.3) < 5 * deviation
    net = decoder(null_probability=1.0)  # in eval mode it never strikes
    a, b = (net.reconstruct(torch.randn(1, 6, 12)) for _ in range(2))
    assert not torch.allclose(a, b, atol=1e-4)


# ---------------------------------------------------------------------- dropped tokens


def test_dropped_registers_become_one_learned_vector():
    net = decoder()
    quantized = torch.randn(2, 6, 12)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    registers = net.registers(quantized, mask)
    own = net.embed(quantized) + net.register_positions
    assert torch.equal(registers[0], own[0]) and torch.equal(registers[1, :2], own[1, :2])
    assert torch.equal(registers[1, 2:], net.dropped[0].expand(4, -1))
    # Replaced, not removed: the vector counts, and a cut code is the masked one.
    masked = net.reconstruct(quantized, mask)
    assert torch.allclose(net.reconstruct(quantized[1:, :2])[0], masked[1], atol=1e-5)
    with torch.no_grad():
        net.dropped += torch.randn(16)
    other = net.reconstruct(quantized, mask)
    assert torch.allclose(other[0], masked[0], atol=1e-5)
    assert not torch.allclose(other[1], masked[1], atol=1e-3)


def test_nested_dropout_draws_a_length_per_image():
    tok = tiny_tokenizer(tokenizer="flextok_tiny").train()
    output = tok(tok.to_model_range(images_of(40)))
    assert output.mask.shape == (40, 4) and output.mask.sum(1).unique().tolist() == [1, 2, 4]
    assert tok.eval()(tok.to_model_range(images_of(2))).mask is None


# ---------------------------------------------------------------------- sampling as users see it


def test_sampling_takes_steps_guidance_and_seed():
    tok = tiny_tokenizer(tokenizer="flextok_tiny")
    awake(tok.decoder)
    ids = tok.tokenize(images_of(3))
    first = tok.detokenize(ids)
    assert torch.equal(tok.detokenize(ids), first)
    assert torch.equal(tok.detokenize(ids, steps=8, guidance=1.0, seed=0), first)
    for other in ({"steps": 2}, {"guidance": 4.0}, {"seed": 1}):
        assert not torch.allclose(tok.detokenize(ids, **other), first, atol=1e-3), other
    # A picture does not depend on its neighbours in the batch.
    assert torch.allclose(tok.detokenize(ids[1:2]), first[1:2], atol=1e-5)
    seeds = torch.tensor([0, 7, 0])
    own = tok.detokenize(ids, seed=seeds)
    assert torch.allclose(own[[0, 2]], first[[0, 2]], atol=1e-5)
    assert torch.allclose(own[1:2], tok.detokenize(ids[1:2], seed=7), atol=1e-5)
    with pytest.raises(ConfigError, match="steps=0"):
        tok.detokenize(ids, steps=0)
    with pytest.raises(ConfigError, match="seed: expected one number or 3"):
        tok.detokenize(ids, seed=torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="it has: steps, guidance, seed"):
        tok.detokenize(ids, cfg=2)


@pytest.mark.parametrize("name", ["flextok_d12_d12", "flextok_d18_d28"])
def test_paper_size_forward_and_backward_on_the_meta_device(name):
    with torch.device("meta"):
        tok = build_tokenizer(config_of(f"experiment={name}")).train()
        quantized = torch.zeros(1, 256, tok.encoder.dim)
        images = torch.zeros(1, 3, 256, 256)
        assert tok.encoder(images).shape == quantized.shape
        tok.encoder(images).sum().backward()
        found = tok.decoder(quantized, images)["image"]
        prediction, target = found.value, found.target
        (prediction - target).square().mean().backward()
    unused = [n for n, p in tok.named_parameters() if p.grad is None]
    assert all(n.startswith("quantizer") or n.endswith("dropped") for n in unused), unused


def test_it_learns_and_more_tokens_help():
    torch.manual_seed(0)
    tok = tiny_tokenizer(tokenizer="flextok_tiny")
    images = images_of(24)
    x = tok.to_model_range(images)
    tok.initialize(x)
    tok.train()
    optimizer = torch.optim.AdamW(tok.parameters(), 4e-3, betas=(0.9, 0.95))
    for _ in range(300):
        output = tok(x)
        loss = (
            (output.predictions["image"].value - output.predictions["image"].target).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tok.parameters(), 1.0)
        optimizer.step()
    tok.eval()
    ids = tok.tokenize(images)
    errors = [
        (tok.detokenize(ids, k, steps=1) - images / 255).square().mean().item() for k in (1, 4)
    ]
    mean = (x.mean(dim=0) - x).square().mean().item() / 4
    assert errors[1] < 0.85 * errors[0] and errors[1] < 0.85 * mean, (errors, mean)
