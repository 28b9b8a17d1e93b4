"""Released FlexTok: ids and pictures are those of the published architecture.

The oracle knows the published kinds of modules, their tensors' names and shapes, and computes in
float64. Sizes are small; heads are 64 wide, as in all published ones.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vistok
from helpers import Names
from vistok.core.errors import CheckpointError, ConfigError
from vistok.export.importer import import_weights

WIDTHS = (64, 128)  # 16 px to maps of 8 x 8, and these to patches of 2 x 2
CHANNELS, TOKENS, LEVELS, SCALE, LATEST = 4, 8, (8, 5, 5), 0.7, 4.0
ENCODER, DECODER = 64, 128
SAID = {
    "_target_": "flextok",
    "vae": str({"scaling_factor": SCALE, "latent_channels": CHANNELS, "hub": None}),
    "decoder": str({"module_dict": {"any": {"max_timestep": LATEST}, "other": [1, 2]}}),
    "regularizer": str({"levels": list(LEVELS)}),
    "odd": "{[1]: 2}",  # no plain value
}


# ---------------------------------------------------------------------- published tensors


def cnn(names, part, kind, blocks, resample):
    widths = WIDTHS if kind == "down" else WIDTHS[::-1]
    width = widths[0]
    names.layer(f"{part}.conv_in", width, 3 if kind == "down" else CHANNELS, 3, 3)
    for level, out in enumerate(widths):
        for n in range(blocks):
            names.res_block(
                f"{part}.{kind}_blocks.{level}.resnets.{n}", width, out, "conv_shortcut"
            )
            width = out
        if level == 0:
            names.layer(f"{part}.{kind}_blocks.0.{resample}.0.conv", width, width, 3, 3)
    middle = WIDTHS[-1]
    for n in range(2):
        names.res_block(f"{part}.mid_block.resnets.{n}", middle, middle, "conv_shortcut")
    attention = f"{part}.mid_block.attentions.0"
    names.norm(f"{attention}.group_norm", middle)
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        names.layer(f"{attention}.{layer}", middle, middle)
    names.norm(f"{part}.conv_norm_out", width)
    names.layer(f"{part}.conv_out", 2 * CHANNELS if kind == "down" else 3, width, 3, 3)


def trunk(names, module, width, modulated):
    hidden = width * 8 // 3
    for n in range(2):
        block = f"{module}.blocks.{n}"
        for layer in ("wq", "wk", "wv", "proj"):
            names.layer(f"{block}.attn.{layer}", width, width, bias=False)
        for layer in ("fc1", "fc3"):
            names.layer(f"{block}.mlp.{layer}", hidden, width, bias=False)
        names.layer(f"{block}.mlp.fc2", width, hidden, bias=False)
        if modulated:
            names.layer(f"{block}.adaLN_modulation.1", 12 * width, width)


def published(seed=0):
    names = Names(seed)
    cnn(names, "vae.vae.encoder", "down", 1, "downsamplers")
    cnn(names, "vae.vae.decoder", "up", 2, "upsamplers")
    names.layer("vae.vae.quant_conv", 2 * CHANNELS, 2 * CHANNELS, 1, 1)
    names.layer("vae.vae.post_quant_conv", CHANNELS, CHANNELS, 1, 1)

    encoder, decoder = "encoder.module_dict.enc", "decoder.module_dict.dec"
    names.layer(f"{encoder}_cut.patch_proj", ENCODER, 4 * CHANNELS)
    names.add(f"{encoder}_where.posembs", 1, ENCODER, 4, 4, scale=0.5)
    names.add(f"{encoder}_tokens.registers", TOKENS, ENCODER, scale=0.5)
    trunk(names, f"{encoder}_trunk", ENCODER, modulated=False)
    names.layer(f"{encoder}_end.proj", len(LEVELS), ENCODER)

    names.layer(f"{decoder}_begin.proj", DECODER, len(LEVELS))
    names.add(f"{decoder}_order.posembs", 1, 1, DECODER, TOKENS, scale=0.5)
    names.add(f"{decoder}_nested.dropout_mask_token", DECODER, scale=0.5)
    names.add(f"{decoder}_nothing.nullcond", DECODER, scale=0.5)
    names.layer(f"{decoder}_cut.patch_proj", DECODER, 4 * CHANNELS)
    names.add(f"{decoder}_where.posembs", 1, DECODER, 4, 4, scale=0.5)
    names.layer(f"{decoder}_when.mlp.0", DECODER, 10)
    names.layer(f"{decoder}_when.mlp.2", DECODER, DECODER)
    trunk(names, f"{decoder}_trunk._checkpoint_wrapped_module", DECODER, modulated=True)
    names.layer(f"{decoder}_end.adaLN_modulation.1", 2 * DECODER, DECODER)
    names.layer(f"{decoder}_end.proj", 4 * CHANNELS, DECODER)
    names.layer(f"{decoder}_aligned.mlp.1", 5, DECODER)  # of its training alone
    names.layer(f"{decoder}_aligned.out_proj", 5, 5)
    return names.tensors


# ---------------------------------------------------------------------- oracle


def normal(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Oracle:
    """The published computation, in float64."""

    def __init__(self, tensors):
        shortened = {k.replace("_checkpoint_wrapped_module.", ""): v for k, v in tensors.items()}
        self.p = {k.replace("module_dict.", ""): v.double() for k, v in shortened.items()}

    def linear(self, name, x):
        y = x @ self.p[f"{name}.weight"].flatten(1).T
        return y + self.p[f"{name}.bias"] if f"{name}.bias" in self.p else y

    def conv(self, name, x, padding=1, stride=1):
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return F.conv2d(x, weight, bias, padding=padding, stride=stride)

    def group_norm(self, name, x):
        return F.group_norm(x, 32, self.p[f"{name}.weight"], self.p[f"{name}.bias"], eps=1e-6)

    def pointwise(self, name, x):
        return self.linear(name, x.movedim(1, 3)).movedim(3, 1)

    # the autoencoder

    def res_block(self, name, x):
        y = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", y)))
        shortcut = f"{name}.conv_shortcut"
        return y + (self.pointwise(shortcut, x) if f"{shortcut}.bias" in self.p else x)

    def middle(self, part, x):
        x = self.res_block(f"{part}.mid_block.resnets.0", x)
        name = f"{part}.mid_block.attentions.0"
        rows = self.group_norm(f"{name}.group_norm", x).flatten(2).transpose(1, 2)
        q, k, v = (self.linear(f"{name}.to_{letter}", rows) for letter in "qkv")
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).softmax(2)
        rows = self.linear(f"{name}.to_out.0", weights @ v)
        x = x + rows.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.res_block(f"{part}.mid_block.resnets.1", x)

    def maps(self, images):
        part = "vae.vae.encoder"
        x = self.conv(f"{part}.conv_in", 2 * images - 1)
        x = self.res_block(f"{part}.down_blocks.0.resnets.0", x)
        x = F.pad(x, (0, 1, 0, 1))
        x = self.conv(f"{part}.down_blocks.0.downsamplers.0.conv", x, 0, 2)
        x = self.middle(part, self.res_block(f"{part}.down_blocks.1.resnets.0", x))
        x = self.conv(f"{part}.conv_out", F.silu(self.group_norm(f"{part}.conv_norm_out", x)))
        return self.pointwise("vae.vae.quant_conv", x)[:, :CHANNELS] * SCALE

    def pictures(self, maps):
        part = "vae.vae.decoder"
        x = self.conv(f"{part}.conv_in", self.pointwise("vae.vae.post_quant_conv", maps / SCALE))
        x = self.middle(part, x)
        for level in range(2):
            for n in range(2):
                x = self.res_block(f"{part}.up_blocks.{level}.resnets.{n}", x)
            if level == 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"{part}.up_blocks.0.upsamplers.0.conv", x)
        x = self.conv(f"{part}.conv_out", F.silu(self.group_norm(f"{part}.conv_norm_out", x)))
        return (x + 1) / 2

    # the transformers

    def patches(self, part, maps):
        squares = maps.unflatten(2, (4, 2)).unflatten(4, (4, 2))  # B, C, row, p, column, q
        rows = squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        places = self.p[f"{part}_where.posembs"][0].flatten(1).T
        return self.linear(f"{part}_cut.patch_proj", rows) + places

    def attend(self, name, x, hidden=None):
        q, k, v = (self.linear(f"{name}.w{a}", x).unflatten(2, (-1, 64)) for a in "qkv")
        logits = torch.einsum("bihd,bjhd->bhij", normal(q), normal(k)) / 8
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        y = torch.einsum("bhij,bjhd->bihd", logits.softmax(3), v)
        return self.linear(f"{name}.proj", y.flatten(2))

    def mlp(self, name, x):
        gated = F.silu(self.linear(f"{name}.fc1", x)) * self.linear(f"{name}.fc3", x)
        return self.linear(f"{name}.fc2", gated)

    def ids(self, maps):
        registers = self.p["encoder.enc_tokens.registers"].expand(len(maps), -1, -1)
        x = torch.cat([self.patches("encoder.enc", maps), registers], 1)
        place = torch.arange(16 + TOKENS)
        hidden = (place[None] >= 16) & (place[None] > place[:, None])
        for n in range(2):
            block = f"encoder.enc_trunk.blocks.{n}"
            x = x + self.attend(f"{block}.attn", normal(x), hidden)
            x = x + self.mlp(f"{block}.mlp", normal(x))
        z = self.linear("encoder.enc_end.proj", normal(x[:, 16:]))
        ids, place = torch.zeros(z.shape[:2], dtype=torch.long), 1
        for axis, count in enumerate(LEVELS):
            reach, offset = 1.001 * (count - 1) / 2, (count % 2 == 0) / 2
            bounded = torch.tanh(z[..., axis] + math.atanh(offset / reach)) * reach - offset
            ids += place * (bounded.round().long() + count // 2)
            place *= count
        return ids

    def registers(self, ids, keep):
        digits, rest = [], ids
        for count in LEVELS:
            digits.append((rest % count - count // 2) / (count // 2))
            rest = rest // count
        x = self.linear("decoder.dec_begin.proj", torch.stack(digits, 2).double())
        x = x + self.p["decoder.dec_order.posembs"][0, 0].T
        dropped = torch.arange(TOKENS)[None, :, None] >= torch.tensor(keep)[:, None, None]
        return torch.where(dropped, self.p["decoder.dec_nested.dropout_mask_token"], x)

    def velocity(self, maps, time, registers):
        turns = 1000 / LATEST * 256.0 ** (-torch.arange(5).double() / 5)
        features = torch.cat([(time * turns).cos(), (time * turns).sin()])
        condition = self.linear("decoder.dec_when.mlp.0", features)
        condition = F.silu(self.linear("decoder.dec_when.mlp.2", F.silu(condition)))
        x = torch.cat([self.patches("decoder.dec", maps), registers], 1)
        first = (torch.arange(16 + TOKENS) < 16)[:, None]
        for n in range(2):
            block = f"decoder.dec_trunk.blocks.{n}"
            said = self.linear(f"{block}.adaLN_modulation.1", condition).chunk(2)
            rows = torch.where(first, *(part[None] for part in said))
            gate, gate2, shift, scale, shift2, scale2 = rows.chunk(6, dim=1)
            x = x + gate * self.attend(f"{block}.attn", normal(x) * (1 + scale) + shift)
            x = x + gate2 * self.mlp(f"{block}.mlp", normal(x) * (1 + scale2) + shift2)
        shift, scale = self.linear("decoder.dec_end.adaLN_modulation.1", condition).chunk(2)
        x = self.linear("decoder.dec_end.proj", normal(x[:, :16]) * (1 + scale) + shift)
        squares = x.unflatten(2, (2, 2, CHANNELS)).unflatten(1, (4, 4))  # B, row, column, p, q, C
        return squares.permute(0, 5, 1, 3, 2, 4).reshape(len(x), CHANNELS, 8, 8)

    def sample(self, noise, registers, steps, guidance):
        null = self.p["decoder.dec_nothing.nullcond"].expand_as(registers)
        x = noise
        for step in range(steps):
            time = 1 - step / steps
            own, free = (self.velocity(x, time, given) for given in (registers, null))
            x = x - (free + guidance * (own - free)) / steps
        return self.pictures(x)


# ---------------------------------------------------------------------- tests


def images(count=3):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def imported(tensors, path, said=SAID, **more):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "w.safetensors", said)
    return vistok.load(import_weights("flextok", path / "w.safetensors", path / "out", **more))


def test_ids_and_pictures_are_the_published_ones(tmp_path):
    tensors = published()
    tok, oracle = imported(tensors, tmp_path), Oracle(tensors)
    maps = oracle.maps(images().double())
    assert torch.allclose(tok.to_signal(2 * images() - 1).double(), maps, atol=1e-5)
    ids = oracle.ids(maps)
    assert torch.equal(tok.tokenize(images())[..., 0], ids) and ids.unique().numel() > 10
    tok.decoder.apg = False
    noise = tok.decoder.noise(3, 5).double()
    for keep, guidance in (([TOKENS] * 3, 1), ([TOKENS, 1, 5], 1), ([TOKENS, 1, 5], 3.0)):
        expected = oracle.sample(noise, oracle.registers(ids, keep), 4, guidance)
        lengths = torch.tensor(keep)
        found = tok.detokenize(ids[..., None], lengths, steps=4, guidance=guidance, seed=5)
        assert torch.allclose(found, expected.clamp(0, 1).float(), atol=5e-5)
        assert expected.std() > 0.1


def test_what_a_file_says_of_itself_is_heeded(tmp_path):
    """Numbers that no tensor has: the code of the published modules has a default for two."""
    tok = imported(published(), tmp_path, {"vae": SAID["vae"], "regularizer": SAID["regularizer"]})
    assert torch.allclose(tok.autoencoder.std, torch.full((CHANNELS,), 1 / SCALE))
    assert tok.decoder.slowest_time * 256**0.8 == pytest.approx(1)  # the fastest of five
    assert tok.quantizer.codebook_sizes == (200,)
    for said, message in (
        ({}, "scaling_factor=null"),
        ({**SAID, "vae": "{'scaling_factor': 0}"}, "scaling_factor=0"),
        ({**SAID, "decoder": "{'max_timestep': 'late'}"}, "max_timestep=late"),
        ({**SAID, "regularizer": "{'levels': 8}"}, "levels: 8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            imported(published(), tmp_path, said, overwrite=True)


def test_what_is_not_as_it_says_is_refused(tmp_path):
    good = published()

    def fails(tensors, **more):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            imported(tensors, tmp_path, **more)
        assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    def without(part):
        return {k: v for k, v in good.items() if part not in k}

    assert "'stranger' has no place" in fails({**good, "stranger": torch.zeros(1)})
    odd = {"decoder.module_dict.dec_odd.thing": torch.zeros(1)}
    assert "'decoder.dec_odd.thing' has no place" in fails({**good, **odd})
    twice = {"encoder.module_dict.enc_more.registers": torch.zeros(2, 2)}
    assert "is the second of its kind (registers)" in fails({**good, **twice})
    assert "positions for 16 px" in fails(good, image_size=32)
    for part in ("mlp.fc3", "nullcond", "enc_tokens", "quant_conv", "to_k", "resnets.0.conv1"):
        assert "missing" in fails(without(part)), part
