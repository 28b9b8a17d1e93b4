"""Released grid tokenizers: ids and pictures are those of the published architectures.

The oracle knows the published names alone, which differ between families in how they spell levels
and in the order of the decoder's, and computes in float64 by torch's functions. All levels are
equally wide but the last, so that a decoder whose levels are mixed up loads and decodes wrongly.
"""

import functools
import os
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import vistok
from helpers import Names
from vistok.core.errors import CheckpointError, ConfigError
from vistok.export.importer import import_weights
from vistok.export.released_files import read_released

WIDTHS = (32, 32, 64)

#: Bands of wavelets: mean, differences of rows, of columns, of diagonals.
HAAR = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]])
HAAR = HAAR.double()


class Layout:
    """How a family spells its names, and what its CNN does."""

    def __init__(self, level="block", middle="block", lowest_first=False, **options):
        self.level, self.middle, self.lowest_first = level, middle, lowest_first
        self.blocks, self.attends, self.biased, self.kind = (1, 2), True, True, "plain"
        self.levels_attend = True
        self.fused, self.unit, self.centered, self.adaptive = False, False, False, False
        self.dim, self.codes, self.around = 16, 16, 1
        self.stem, self.halvings, self.other = 1, 2, (16, 24)
        self.__dict__ |= options

    def place(self, part, level):
        if self.level == "res":
            number = level if part == "encoder" else len(WIDTHS) - 1 - level
            return f"{part}.conv_blocks.{number}"
        mirrored = self.lowest_first and part == "decoder"
        number = len(WIDTHS) - 1 - level if mirrored else level
        return f"{part}.{'down' if part == 'encoder' else 'up'}.{number}"

    def block(self, part, level, number):
        return f"{self.place(part, level)}.{self.level}.{number}"

    def attention(self, part, level, number):
        return f"{self.place(part, level)}.attn.{number}"

    def resample(self, part, level):
        ends = {
            "plain": ("downsample.conv", "upsample.conv"),
            "open": ("downsample", "upsample.conv1"),
            "skip": ("down_conv", "upsample_conv"),
        }[self.kind]
        return f"{self.place(part, level)}.{ends[part == 'decoder']}"

    def middles(self, part):
        if self.middle == "block":
            return [f"{part}.mid.{n}" for n in ("block_1", "attn_1", "block_2")]
        return [f"{part}.{self.middle}.{n}" for n in range(3 if self.attends else 2)]


LAYOUTS = {
    "vqgan": Layout(),
    "gumbel": Layout(),
    "llamagen": Layout("res", "mid", codes=8),
    "janus": Layout(lowest_first=True, codes=8),
    "var": Layout(fused=True, around=3),
    "ibq": Layout(blocks=(4, 5)),
    "rq_vae": Layout(),
    "open_magvit2": Layout(
        "block", "mid_block", kind="open", attends=False, biased=False, centered=True,
        adaptive=True, dim=10, around=0, blocks=(2, 2),
    ),
    "maskbit": Layout(
        "res_blocks", "mid.res_blocks", kind="skip", attends=False, biased=False, unit=True,
        dim=10, around=0, lowest_first=True, blocks=(2, 2),
    ),
    "cosmos": Layout(levels_attend=False, codes=6, stem=4, halvings=1),
    "cosmos_di16": Layout(levels_attend=False, codes=6, stem=4, other=(64, 96)),
}  # fmt: skip
LAYOUTS["maskbit_legacy"] = Layout(**{**LAYOUTS["maskbit"].__dict__, "lowest_first": False})
SOURCES = {"gumbel": "vqgan", "maskbit_legacy": "maskbit", "cosmos_di16": "cosmos"}


def published(family, seed=0, channels=3):
    layout, names = LAYOUTS[family], Names(seed)

    def block(name, width, out):
        bias = layout.biased
        names.norm(f"{name}.norm1", width)
        names.layer(f"{name}.conv1", out, width, 3, 3, bias=bias)
        names.norm(f"{name}.norm2", out)
        names.layer(f"{name}.conv2", out, out, 3, 3, bias=bias)
        if width != out:
            skip = out if layout.kind == "skip" else width
            names.layer(f"{name}.nin_shortcut", out, skip, 1, 1, bias=bias)

    def attention(name, width):
        names.norm(f"{name}.norm", width)
        for part, out in (("qkv", 3),) if layout.fused else (("q", 1), ("k", 1), ("v", 1)):
            names.layer(f"{name}.{part}", out * width, width, 1, 1)
        names.layer(f"{name}.proj_out", width, width, 1, 1)

    for part, count in zip(("encoder", "decoder"), layout.blocks, strict=True):
        encodes = part == "encoder"
        width = WIDTHS[0] if encodes else WIDTHS[-1]
        start = channels * layout.stem**2 if encodes else layout.dim
        names.layer(f"{part}.conv_in", width, start, 3, 3, bias=layout.biased or not encodes)
        levels = range(3) if encodes else reversed(range(3))
        for level in levels:
            if layout.adaptive and not encodes:
                number = layout.place(part, level).rpartition(".")[2]
                for end in ("gamma", "beta"):
                    names.layer(f"decoder.adaptive.{number}.{end}", width, layout.dim)
            for n in range(count):
                block(layout.block(part, level, n), width, WIDTHS[level])
                width = WIDTHS[level]
                if layout.attends and layout.levels_attend and level == 2:
                    attention(layout.attention(part, level, n), width)
            if level < layout.halvings if encodes else level > 2 - layout.halvings:
                times = 4 if layout.adaptive and not encodes else 1
                names.layer(layout.resample(part, level), times * width, width, 3, 3)
        for n, name in enumerate(layout.middles(part)):
            if layout.attends and n == 1:
                attention(name, WIDTHS[-1])
            else:
                block(name, WIDTHS[-1], WIDTHS[-1])
        names.norm(f"{part}.norm_out", width)
        side = 3 if not encodes or layout.biased else 1
        out = layout.dim if encodes else channels * layout.stem**2
        names.layer(f"{part}.conv_out", out, width, side, side)
    if layout.around:
        side = layout.around
        names.layer("quant_conv", layout.codes, layout.dim, side, side)
        names.layer("post_quant_conv", layout.dim, layout.codes, side, side)
    codebook(family, names, layout)
    return names.tensors


def codebook(family, names, layout):
    if family == "gumbel":
        names.layer("quantize.proj", 40, 16, 1, 1)
        names.add("quantize.embed.weight", 40, 16, scale=1.0)
    elif family == "rq_vae":
        names.add("quantizer.codebooks.0.weight", 41, 16, scale=0.5)
        for n in range(3):
            base = f"quantizer.codebooks.{n}"
            names.tensors[f"{base}.weight"] = names.tensors["quantizer.codebooks.0.weight"]
            names.add(f"{base}.cluster_size_ema", 40)
            names.add(f"{base}.embed_ema", 40, 16)
    elif layout.around and layout.stem == 1:
        names.add("quantize.embedding.weight", 40, layout.codes, scale=1.0)
    if family == "var":
        for n in range(4):
            names.layer(f"quantize.quant_resi.qresi_ls.{n}", 16, 16, 3, 3)
        names.add("quantize.ema_vocab_hit_SV", 10, 40)
    if family == "llamagen":
        names.add("quantize.codebook_used", 9)


class Oracle:
    """The published forwards, in float64."""

    def __init__(self, family, tensors):
        self.family, self.layout = family, LAYOUTS[family]
        self.p = {k: v.double() for k, v in tensors.items()}

    def conv(self, name, x, padding=None, stride=1):
        weight = self.p[f"{name}.weight"]
        padding = weight.shape[2] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.p.get(f"{name}.bias"), stride, padding)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.p[f"{name}.weight"], self.p[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        y = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", y)))
        shortcut = f"{name}.nin_shortcut"
        if f"{shortcut}.weight" not in self.p:
            return x + y
        return y + self.conv(shortcut, y if self.layout.kind == "skip" else x)

    def attend(self, name, x):
        y = self.norm(f"{name}.norm", x)
        if self.layout.fused:
            q, k, v = self.conv(f"{name}.qkv", y).flatten(2).chunk(3, dim=1)
        else:
            q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=2)
        y = (v @ weights.transpose(1, 2)).view_as(x)
        return x + self.conv(f"{name}.proj_out", y)

    def level(self, part, level, x):
        for n in range(self.layout.blocks[part == "decoder"]):
            x = self.block(self.layout.block(part, level, n), x)
            if self.layout.attends and self.layout.levels_attend and level == 2:
                x = self.attend(self.layout.attention(part, level, n), x)
        return x

    def middle(self, part, x):
        for n, name in enumerate(self.layout.middles(part)):
            x = self.attend(name, x) if self.layout.attends and n == 1 else self.block(name, x)
        return x

    def latents(self, images):
        x = images if self.layout.unit else 2 * images - 1
        for _ in range(self.layout.stem // 2):
            # Rows of means and differences of four pixels, of all channels one after the other.
            x = F.conv2d(x.flatten(0, 1)[:, None], HAAR[:, None] / 4, stride=2)
            x = x.unflatten(0, (len(images), -1)).transpose(1, 2).flatten(1, 2)
        x = self.conv("encoder.conv_in", x)
        for level in range(3):
            x = self.level("encoder", level, x)
            if level < self.layout.halvings:
                name = self.layout.resample("encoder", level)
                x = x if self.layout.centered else F.pad(x, (0, 1, 0, 1))
                x = self.conv(name, x, int(self.layout.centered), 2)
        x = self.middle("encoder", x)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)))
        return self.conv("quant_conv", x) if self.layout.around else x

    def nearest(self, rows, name="quantize.embedding.weight"):
        return torch.cdist(rows, self.p[name], compute_mode="donot_use_mm_for_euclid_dist").argmin(
            -1
        )

    def codes(self, images):
        """Ids (B, N, Q), and the map that the decoder gets."""
        z = self.latents(images)
        rows = z.flatten(2).transpose(1, 2)
        table = self.p.get("quantize.embedding.weight")
        if self.family == "var":
            return self.scales(z)
        if self.layout.stem > 1:
            return self.rounded(z)
        if self.family == "gumbel":
            ids = self.conv("quantize.proj", z).flatten(2).argmax(dim=1)
            vectors = self.p["quantize.embed.weight"][ids]
        elif self.family == "rq_vae":
            table, left, ids = self.p["quantizer.codebooks.0.weight"][:-1], rows, []
            for _ in range(3):
                ids.append(torch.cdist(left, table).argmin(-1))
                left = left - table[ids[-1]]
            return torch.stack(ids, 2), (rows - left).transpose(1, 2).view_as(z)
        elif not self.layout.around:
            bits = (rows > 0).long()
            ids, vectors = (bits * 2 ** torch.arange(10)).sum(2), 2.0 * bits.double() - 1
        elif self.family == "ibq":
            ids = (rows @ table.T).argmax(-1)
            vectors = table[ids]
        else:
            if self.layout.codes == 8:
                table = F.normalize(table, dim=1)
                rows = F.normalize(rows, dim=2)
            ids = torch.cdist(rows, table).argmin(-1)
            vectors = table[ids]
        return ids[..., None], vectors.transpose(1, 2).reshape(z.shape)

    def rounded(self, z):
        levels = torch.tensor([8, 8, 8, 5, 5, 5])[:, None, None]
        reach, offset = (levels - 1).double() * 1.001 / 2, (levels % 2 == 0) / 2
        digits = ((z + (offset / reach).atanh()).tanh() * reach - offset).round()
        places = torch.tensor([1, 8, 64, 512, 2560, 12800])[:, None, None]
        ids = ((digits + levels // 2) * places).sum(1).long()
        return ids.flatten(1)[..., None], digits / (levels // 2)

    def scales(self, z):
        table, left, ids = self.p["quantize.embedding.weight"], z, []
        served = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)  # which convolution, by the released rule
        for scale, phi in zip((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), served, strict=True):
            small = F.interpolate(left, size=(scale, scale), mode="area")
            ids.append(torch.cdist(small.flatten(2).transpose(1, 2), table).argmin(-1))
            layer = table[ids[-1]].transpose(1, 2).view_as(small)
            if scale < 16:
                layer = F.interpolate(layer, size=(16, 16), mode="bicubic")
            layer = 0.5 * layer + 0.5 * self.conv(f"quantize.quant_resi.qresi_ls.{phi}", layer)
            left = left - layer
        return torch.cat(ids, 1)[..., None], z - left

    def pictures(self, codes):
        z = self.conv("post_quant_conv", codes) if self.layout.around else codes
        x = self.middle("decoder", self.conv("decoder.conv_in", z))
        for level in reversed(range(3)):
            if self.layout.adaptive:
                number = self.layout.place("decoder", level).rpartition(".")[2]
                spread = (z.flatten(2).var(dim=2) + 1e-6).sqrt()
                scale, shift = (
                    F.linear(
                        value,
                        self.p[f"decoder.adaptive.{number}.{end}.weight"],
                        self.p[f"decoder.adaptive.{number}.{end}.bias"],
                    )[..., None, None]
                    for end, value in (("gamma", spread), ("beta", z.flatten(2).mean(2)))
                )
                x = F.group_norm(x, 32, eps=1e-6) * scale + shift
            x = self.level("decoder", level, x)
            if level > 2 - self.layout.halvings:
                name = self.layout.resample("decoder", level)
                if self.layout.adaptive:
                    y = self.conv(name, x)
                    x = y.new_empty(len(y), y.shape[1] // 4, 2 * y.shape[2], 2 * y.shape[3])
                    for place, part in enumerate(y.chunk(4, dim=1)):
                        x[:, :, place // 2 :: 2, place % 2 :: 2] = part
                else:
                    x = self.conv(name, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))
        for _ in range(self.layout.stem // 2):
            bands = x.unflatten(1, (4, -1)).transpose(1, 2).flatten(0, 1)
            x = F.conv_transpose2d(bands, HAAR[:, None], stride=2).unflatten(0, (len(codes), -1))
            x = x.squeeze(2)
        return 2 * x - 1 if self.layout.unit else x


def pictures(*size, count=2, channels=3):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(1))


def imported(source, tensors, path, **more):
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path / "w.safetensors")
    return vistok.load(import_weights(source, path / "w.safetensors", path / "out", **more))


@pytest.mark.parametrize("family", LAYOUTS)
def test_ids_and_pictures_are_the_published_ones(family, tmp_path, capsys):
    tensors, source = published(family), SOURCES.get(family, family)
    side = 64 if family in ("var", "cosmos_di16") else 32
    tok, oracle = imported("auto", tensors, tmp_path, image_size=side), Oracle(family, tensors)
    assert f"source=auto: {source}, for" in capsys.readouterr().out
    for size in [(side, side)] + [LAYOUTS[family].other] * (family != "var"):
        images, sized = pictures(*size), tok.at(size)
        ids, codes = oracle.codes(images.double())
        assert torch.equal(sized.tokenize(images), ids) and ids.unique().numel() > 8
        found = sized.decode(sized.quantizer.decode(ids, sized.encoder.grid))
        expected = oracle.pictures(codes)
        assert (found - expected).abs().max() < 1e-4
        assert expected.std() > 0.1 and (expected[0] - expected[1]).std() > 0.01


def test_images_of_different_sizes_get_the_ids_that_each_has_alone(tmp_path):
    tok = imported("llamagen", published("llamagen"), tmp_path, image_size=[16, 32])
    sizes = [(16, 32), (64, 96), (16, 32), (32, 16)]
    images = [pictures(*size, count=1)[0] for size in sizes]
    found = tok.tokenize(images)
    assert [len(ids) for ids in found] == [h * w // 16 for h, w in sizes]
    for image, ids in zip(images, found, strict=True):
        assert torch.equal(tok.at(image.shape[1:]).tokenize(image[None])[0], ids)
    assert tok.image_size == (16, 32) and tok.encoder.grid == (4, 8)  # itself unchanged
    with pytest.raises(ConfigError, match="not divisible"):
        tok.at((18, 16))
    # Batches of other sizes train the same weights.
    tok.train()(pictures(32, 16)).predictions["image"].value.square().mean().backward()
    assert all(p.grad is not None for n, p in tok.named_parameters() if "decoder" in n)


def test_one_channel(tmp_path):
    tensors = published("vqgan", channels=1)
    tok = imported("vqgan", tensors, tmp_path, image_size=32)
    images = pictures(32, 32, channels=1)
    ids, codes = Oracle("vqgan", tensors).codes(images.double())
    assert tok.channels == 1 and torch.equal(tok.tokenize(images), ids)


def test_of_a_lightning_checkpoint_the_averages_without_dots_are_taken(tmp_path):
    live, averaged = published("ibq", seed=0), published("ibq", seed=1)
    averages = {f"model_ema.{k.replace('.', '')}": v for k, v in averaged.items()}
    # A frozen weight has no average.
    kept = "encoder.conv_in.bias"
    del averages[f"model_ema.{kept.replace('.', '')}"]
    extra = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    loss = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    state = {**live, **averages, **extra, **loss}
    torch.save({"state_dict": state, "global_step": 3, "epoch": 1}, tmp_path / "last.ckpt")
    out = import_weights("ibq", tmp_path / "last.ckpt", tmp_path / "averaged")
    expected = imported("ibq", {**averaged, kept: live[kept]}, tmp_path).state_dict()
    found = vistok.load(out).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_folder_of_hugging_face_and_the_license(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    tensors = {f"model.vqmodel.{k}": v for k, v in published("janus").items()}
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    parts[0]["model.language_model.embed"] = torch.zeros(2)
    index = {}
    for n, part in enumerate(parts):
        save_file({k: v.contiguous() for k, v in part.items()}, folder / f"{n}.safetensors")
        index |= dict.fromkeys(part, f"{n}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": ' + str(index).replace("'", '"') + "}"
    )
    out = import_weights("auto", folder, tmp_path / "out", image_size=32)
    ids, _ = Oracle("janus", published("janus")).codes(pictures(32, 32).double())
    assert torch.equal(vistok.load(out).tokenize(pictures(32, 32)), ids)
    assert '"license": "DeepSeek Model License"' in (out / "config.json").read_text()
    assert "DeepSeek Model License" in (out / "README.md").read_text()


class Scripted(torch.nn.Module):
    """A module with given tensors, which returns what it gets."""

    def __init__(self, tensors):
        super().__init__()
        for name, value in tensors.items():
            *places, end = name.split(".")
            module = self
            for place in places:
                if place not in module._modules:
                    module.add_module(place, torch.nn.Module())
                module = module._modules[place]
            module.register_buffer(end, value)

    def forward(self, x):
        return x + 1


def test_a_script_gives_its_tensors_and_none_of_its_code_runs(tmp_path, monkeypatch):
    tensors = {k: v.bfloat16() for k, v in published("cosmos").items()}
    kept = {"quantizer._levels": torch.tensor([8, 8, 8, 5, 5, 5]), "empty.wavelets": torch.ones(0)}
    script = torch.jit.trace(Scripted({**tensors, **kept}), torch.ones(1))
    path = tmp_path / "autoencoder.jit"
    torch.jit.save(script, path)
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("ran the file's code"))
    found = read_released(path).left
    assert found.keys() == tensors.keys() | kept.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    del kept["empty.wavelets"]
    torch.jit.save(torch.jit.trace(Scripted({**tensors, **kept}), torch.ones(1)), path)
    tok = vistok.load(import_weights("auto", path, tmp_path / "out", image_size=32))
    ids, _ = Oracle("cosmos", tensors).codes(pictures(32, 32).double())
    assert torch.equal(tok.tokenize(pictures(32, 32)), ids)


def test_a_script_that_is_more_than_modules_is_refused(tmp_path):
    path = tmp_path / "evil.jit"

    def fails(content, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("evil/constants.pkl", b"")
            archive.writestr("evil/data.pkl", content)
        with pytest.raises(CheckpointError) as caught:
            import_weights("cosmos", path, tmp_path / "out")
        assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    touch = pickle.dumps(functools.partial(os.mkdir, str(tmp_path / "ran")))
    call = b"cos\nmkdir\n(S'" + str(tmp_path / "ran").encode() + b"'\ntR."
    for code in (touch, call):
        assert "refused; it contains more than tensors" in fails(code)
    assert "or is damaged" in fails(b"not a pickle")
    assert "is compressed" in fails(call, zipfile.ZIP_DEFLATED)
    assert "not a plain state_dict" in fails(pickle.dumps({}))


def test_what_is_not_as_it_says_is_refused_with_the_nearest_family(tmp_path):
    good = published("llamagen")

    def fails(tensors, source="llamagen"):
        with pytest.raises(CheckpointError) as caught:
            imported(source, tensors, tmp_path, image_size=32)
        assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert "'stranger' has no place" in fails({**good, "stranger": torch.zeros(1)})
    assert "it looks like source=llamagen" in fails(good, source="vqgan")
    assert "it looks like source=var" in fails(published("var"), source="vqgan")
    strange = {k.replace("mid.2.conv1", "mid.2.conv9"): v for k, v in good.items()}
    said = fails(strange)
    left = [f"'{p}.mid.2.conv9.{k}'" for p in ("decoder", "encoder") for k in ("bias", "weight")]
    missing = [f"'{p}.mid.2.conv1.{k}'" for p in ("encoder", "decoder") for k in ("bias", "weight")]
    assert f"missing {', '.join(missing)}; without a place {', '.join(left)}" in said
    assert "it looks like" not in said  # no other family is nearer
    del strange["encoder.mid.2.norm2.bias"]
    assert "missing 'encoder.mid.2.norm2.bias', 'encoder.mid.2.conv1" in fails(strange, "auto")
    unmarked = {k: v for k, v in good.items() if not k.startswith("quant_conv")}
    said = "the nearest is source=llamagen: missing 'quant_conv.weight', 'quant_conv.bias'"
    assert said in fails(unmarked, "auto")
    assert "'encoder.mid.2.norm2.bias', 'encoder.mid.2.conv1.weight'" in fails(strange)
    renamed = {f"stranger.{k}": v for k, v in good.items()}
    assert "takes all tensors, and none is near" in fails(renamed, source="auto")
    assert "no family is near" in fails(renamed)
    # Of an importer that cannot go on, what it has found so far.
    said = fails(published("ibq"), source="titok")
    assert "missing 'encoder.patch_embed.weight', 'encoder.positional_embedding'" in said
    assert "; not come to 'decoder.conv_in.bias', " in said and "it looks like source=ibq" in said


@pytest.mark.slow
@pytest.mark.parametrize("model", ["janus", "chameleon"])
def test_ids_are_those_of_transformers(model, tmp_path):
    """Janus' class searches by distances of latents and codes as they are; so codes are unit."""
    transformers = pytest.importorskip("transformers")
    sizes = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_embeddings": 64}
    if model == "janus":
        config = transformers.JanusVQVAEConfig(
            **sizes, embed_dim=8, latent_channels=16, num_patches=8
        )
        theirs = transformers.models.janus.modeling_janus.JanusVQVAE(config)
    else:
        config = transformers.ChameleonVQVAEConfig(**sizes, embed_dim=16, latent_channels=16)
        theirs = transformers.ChameleonVQVAE(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(spread * scale + (parameter.ndim == 1))
        table = theirs.quantize.embedding.weight
        table.copy_(F.normalize(torch.randn(table.shape, generator=generator), dim=1))
    tok = imported(model, theirs.state_dict(), tmp_path, image_size=32)
    images = pictures(32, 32)
    ids = theirs.encode(2 * images - 1).image_tokens.view(2, -1)
    assert ids.unique().numel() > 4
    assert torch.equal(tok.tokenize(images)[..., 0], ids)
    if model == "chameleon":
        with pytest.raises(ConfigError, match="have no decoder"):
            tok.detokenize(ids[..., None])
        return
    with torch.no_grad():
        expected = theirs.decode(ids)
    expected = expected.permute(0, 3, 1, 2) if expected.shape[-1] == 3 else expected
    found = tok.decode(tok.quantizer.decode(ids[..., None]))
    assert torch.allclose(found, expected, atol=1e-4)
