"""Random weights of grid tokenizers by their published names, and what the originals compute.

The oracle knows the published names alone, which differ between families in how they spell levels
and in the order of the decoder's, and computes in float64 by torch's functions. All levels are
equally wide but the last, so that a decoder whose levels are mixed up loads and decodes wrongly.
"""

import torch
import torch.nn.functional as F

from helpers import Names

WIDTHS = (32, 32, 64)

#: Bands of wavelets: mean, differences of rows, of columns, of diagonals.
HAAR = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]])
HAAR = HAAR.double()


class Layout:
    """How a family spells its names, and what its CNN does."""

    def __init__(self, level="block", middle="block", lowest_first=False, **options):
        self.level, self.middle, self.lowest_first = level, middle, lowest_first
        self.blocks, self.attends, self.biased, self.kind = (1, 2), True, True, "plain"
        self.levels_attend, self.moments = True, False
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
    "chameleon": Layout(levels_attend=False),
    "llamagen": Layout("res", "mid", codes=8),
    "janus": Layout(lowest_first=True, codes=8),
    "var": Layout(fused=True, around=3, other=(32, 48)),
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
    # Their encoders end in means and log variances: attention in the middle alone, and in levels.
    "kl_f8": Layout(levels_attend=False, dim=4, codes=4, moments=True),
    "kl_f16": Layout(moments=True),
    "cosmos_di16": Layout(levels_attend=False, codes=6, stem=4, other=(64, 96)),
}  # fmt: skip
LAYOUTS["maskbit_legacy"] = Layout(**{**LAYOUTS["maskbit"].__dict__, "lowest_first": False})
SOURCES = {
    "gumbel": "vqgan",
    "chameleon": "vqgan",
    "maskbit_legacy": "maskbit",
    "cosmos_di16": "cosmos",
}


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
        out = layout.dim * (1 + layout.moments) if encodes else channels * layout.stem**2
        names.layer(f"{part}.conv_out", out, width, side, side)
    if layout.around:
        side = layout.around
        times = 1 + layout.moments
        names.layer("quant_conv", times * layout.codes, times * layout.dim, side, side)
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
    elif layout.around and layout.stem == 1 and not layout.moments:
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
        # VAR's scales, and which convolution serves each, by the released rule.
        self.served = dict(
            zip((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (0, 0, 1, 1, 1, 2, 2, 3, 3, 3), strict=True)
        )

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
        x = self.conv("quant_conv", x) if self.layout.around else x
        return x.chunk(2, dim=1)[0] if self.layout.moments else x

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
        last = max(self.served)
        for scale, phi in self.served.items():
            # Of a grid that is not square, sides in proportion.
            small = [(2 * side * scale + last) // (2 * last) for side in z.shape[2:]]
            small = F.interpolate(left, size=[max(1, side) for side in small], mode="area")
            ids.append(torch.cdist(small.flatten(2).transpose(1, 2), table).argmin(-1))
            layer = table[ids[-1]].transpose(1, 2).view_as(small)
            if scale < last:
                layer = F.interpolate(layer, size=z.shape[2:], mode="bicubic")
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
