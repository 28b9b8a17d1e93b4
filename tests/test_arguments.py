"""What a part of a tokenizer can't be built from is refused in one line that begins with the key."""

import pytest
import torch

from helpers import config_of
from vistok.core.errors import ConfigError
from vistok.models.build import build_tokenizer

E, D = "tokenizer.encoder", "tokenizer.decoder"
WHOLE = "must be a whole number, 1 or more"


@pytest.mark.parametrize(
    ("tokenizer", "override", "message"),
    [
        ("titok_tiny", f"{E}.num_latent_tokens=0", WHOLE),
        ("titok_tiny", f"{E}.num_latent_tokens=-4", WHOLE),
        ("flextok_tiny", f"{E}.num_latent_tokens=2.5", WHOLE),
        ("gigatok_tiny", f"{E}.depth=-1", WHOLE),
        ("retok_tiny", f"{D}.depth=0", WHOLE),
        ("titok_tiny", f"{E}.depth=0", WHOLE),
        ("hita_tiny", f"{E}.causal_depth=-1", WHOLE),
        ("titok_tiny", f"{E}.num_heads=0", WHOLE),
        ("titok_tiny", f"{E}.patch_size=0", WHOLE),
        ("flextok_tiny", f"{E}.patch_size=8.0", WHOLE),
        ("titok_tiny", f"{E}.width=0", WHOLE),
        ("titok_tiny", f"{E}.width=null", WHOLE),
        ("titok_tiny", "tokenizer.latent_dim=0", WHOLE),
        ("hita_tiny", "tokenizer.latent_dim=null", WHOLE),
        ("vqgan_tiny", "tokenizer.latent_dim=-2", WHOLE),
        ("restok_tiny", "tokenizer.latent_dim=2.5", WHOLE),
        ("titok_tiny", f"{D}.latent_dim=0", WHOLE),
        ("vqgan_tiny", "quantizer.dim=0", WHOLE),
        ("hita_tiny", f"{D}.width=0", WHOLE),
        ("hita_tiny", f"{D}.cnn.latent_dim=0", WHOLE),
        ("restok_tiny", f"{E}.cnn.stem=0", WHOLE),
        ("vqgan_tiny", f"{E}.stem=true", WHOLE),
        ("vqgan_tiny", f"{D}.num_res_blocks=-1", WHOLE),
        ("vqgan_tiny", f"{E}.channel_multipliers=[]", "a list of whole numbers, 1 or more"),
        ("vqgan_tiny", f"{E}.channel_multipliers=[1,0]", "a list of whole numbers, 1 or more"),
        ("vqgan_tiny", f"{E}.channel_multipliers=2", "a list of whole numbers, 1 or more"),
        ("titok_tiny", f"{E}.content=-1", "must be a number, 0 or more"),
        ("titok_tiny", f"{E}.content=null", "must be a number"),
        ("titok_tiny", f"{E}.causal=1", "must be true or false"),
        ("retok_tiny", f"{E}.padding_start=8.5", "must be a whole number, 0 or more, or null"),
        ("restok_tiny", f"{E}.merge_layers=0", "must be a list of whole numbers"),
        ("restok_tiny", f"{E}.merge_layers=[4]", "rising indices of the blocks, 0 to 3"),
        ("restok_tiny", f"{E}.depth=0", WHOLE),
        ("ta_titok_tiny", f"{D}.text_dropout=null", "must be a number"),
        ("ta_titok_tiny", f"{D}.text_dropout=2", "must be a number, 0 to 1"),
        ("titok_tiny", f"{E}.num_heads=5", "does not divide the width 192"),
        ("gigatok_tiny", f"{D}.num_heads=5", "does not divide the width 128"),
        ("restok_tiny", f"{D}.num_heads=5", "does not divide the width 128"),
        ("gigatok_tiny", f"{E}.num_latent_tokens=100", "pooled queries need a power of two"),
        ("hita_tiny", f"{E}.block=nonsense", "must be biased or normalized"),
        ("hita_tiny", f"{E}.embed=none", "must be conv or linear"),
        ("gigatok_tiny", f"{D}.norm=none", "must be input or embedding"),
        ("restok_tiny", f"{E}.merge_axis=rows", "must be columns or longest"),
        ("restok_tiny", f"{E}.places=none", "must be queued or centered"),
        ("restok_tiny", f"{D}.places=none", "must be queued or centered"),
        ("restok_tiny", f"{E}.level_vectors=none", "must be block or merge"),
        ("flextok_tiny", f"{D}.time_dim=null", "must be a whole number"),
        ("flextok_tiny", f"{D}.time_dim=7", "must be even"),
        ("hita_tiny", f"{E}.attention=sparse", "must be dense or flex"),
        ("titok_tiny", f"{D}.border=white", "must be black or edge"),
        ("titok_conv_tiny", f"{D}.num_res_blocks=0", WHOLE),
        ("titok_conv_tiny", f"{D}.cell_size=3", "must divide patch_size=8"),
        ("titok_conv_tiny", f"{D}.cell_channels=11", "at least the 12 values of the pixels"),
        ("vqgan_tiny", f"{D}.upsample=cubic", "must be nearest or depth_to_space"),
        ("gigatok_tiny", f"{D}.cnn.upsample=cubic", "must be nearest or depth_to_space"),
        ("hita_tiny", f"{D}.num_holistic_tokens=4", f"{E}.num_holistic_tokens=16"),
        ("titok_tiny", "quantizer.codebook_dim=2.5", "must be a whole number"),
        ("flextok_tiny", "quantizer.num_codebooks=0", WHOLE),
        ("flextok_tiny", "quantizer.noise_dropout=2", "must be a number, 0 to 1"),
        ("restok_tiny", "tokenizer.length.shortest=0", WHOLE),
        ("restok_tiny", "tokenizer.length.shortest=2.5", "must be a whole number"),
        ("restok_tiny", "tokenizer.length.shortest=3", "must be a power of two"),
        ("restok_tiny", "tokenizer.length.shortest=128", "must be at most 64, the whole code"),
        ("restok_tiny", "tokenizer.length.full_probability=null", "must be a number"),
        ("restok_tiny", "tokenizer.length.full_probability=1.5", "must be a number, 0 to 1"),
        ("flextok_tiny", "tokenizer.length.per=image", "must be sample or batch"),
        ("flextok_tiny", "tokenizer.length.distribution=pow2", "did you mean 'powers_of_two'"),
    ],
)
def test_values_that_build_nothing(tokenizer, override, message):
    with torch.device("meta"), pytest.raises(ConfigError) as error:
        build_tokenizer(config_of(f"experiment={tokenizer}", override))
    text = str(error.value)
    assert text.startswith(override.replace("[1,0]", "[1, 0]")) and message in text
    assert "\n" not in text


def test_a_count_is_refused_by_the_key_of_the_quantizer_that_has_it():
    config = config_of("experiment=hita_tiny")
    second = config_of("~experiment", "quantizer=fsq")["quantizer"] | {"num_codebooks": 0}
    config["tokenizer"]["holistic_quantizer"] = second
    with pytest.raises(
        ConfigError, match=r"^tokenizer.holistic_quantizer.num_codebooks=0: must be"
    ):
        build_tokenizer(config)
