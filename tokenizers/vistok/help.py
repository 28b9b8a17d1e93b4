"""Help for people; imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from vistok.core.configuration import config_dir, header, options, user_config_dirs


def overview() -> None:
    """`vistok --help`."""
    print(
        """vistok: an open training framework for discrete visual tokenizers

  vistok train [key=value ...]               train a tokenizer, or resume=runs/<run>
  vistok eval run=runs/<run>                 metrics, metrics.json, pictures
  vistok export run=runs/<run> out=FOLDER    codebooks and weights for other programs
  vistok import-weights source=titok ...     released weights (TiTok's family, MaskGIT's VQGAN)
  vistok make-shards IMAGES out=FOLDER       images of any source to WebDataset shards
  vistok check-shards FOLDER                 are they whole, and as their manifest says?
  vistok bench-data [SHARDS]                 images per second of the data stream

Each takes --help. In a checkout the same are: uv run train.py, eval.py, and scripts/export.py,
import_weights.py, make_shards.py, check_shards.py and bench_data.py."""
    )


def train_help() -> None:
    """`train.py --help`."""
    print(
        f"""Train a discrete visual tokenizer, or resume a run.

usage: train.py [key=value ...]

examples
  train.py                                                    the default run, minutes on a CPU
  train.py experiment=vqgan_tiny trainer.max_steps=500 quantizer.codebook_size=512
  train.py data=folder data.train=/photos data.image_size=128
  train.py data=shards 'data.train=/sets/train-{{000000..000127}}.tar' data.val=/sets/val.tar
  train.py resume=runs/<run>                                  with that run's own config
  train.py init_from=exported/my_tokenizer                    fine-tune from weights
  train.py --multirun quantizer=ema_vq,fsq seed=0,1           one run for each combination

{_listing("experiment", "experiments (experiment=NAME)")}

{_listing("quantizer", "quantizers (quantizer=NAME)")}

{_listing("tokenizer", "tokenizers (tokenizer=NAME)")}

{_listing("stage", "stages (stage=NAME)")}

{_listing("adversary", "adversaries (adversary=NAME)")}

{_listing("data", "data (data=NAME)")}

{_listing("logger", "loggers (logger=NAME)")}

main keys
  trainer.max_steps=1000           optimizer steps
  trainer.accelerator=auto         cpu, gpu or auto; trainer.devices=8 for several GPUs
  trainer.precision=auto           bf16, 16, 32; auto takes bf16 where the processor has it
  trainer.val_check_interval=250   steps between validations and pictures
  data.image_size=64               pixels, or [height,width]; data.channels=3
  data.batch_size=32               images per device
  quantizer.codebook_size=1024     codes
  tokenizer.encoder.num_latent_tokens=64   length of the code of a 1D tokenizer
  optimizer.lr=1e-4                and optimizer.warmup_samples, in images
  ema.decay=0.999                  of the averaged weights
  seed=0                           of everything
  debug=true                       show tracebacks

  --cfg job                        print the whole config: every key there is
  --config-dir FOLDER              configs of your own (or VISTOK_CONFIG_DIR), laid out as ours
"""
    )


def eval_help() -> None:
    """`eval.py --help`."""
    print(
        """Evaluate a tokenizer: PSNR, SSIM, codebook usage, bits; a table, metrics.json, a picture.

usage: eval.py run=runs/<run> [key=value ...]

examples
  eval.py run=runs/<run>                            on that run's validation images
  eval.py run=exported/my_tokenizer data=shards data.val=/sets/val-000000.tar
  eval.py run=runs/<run> weights=last               the raw weights, not the averaged ones
  eval.py run=runs/<run> 'eval.num_tokens=[1,8,64]' a curve over budgets (flexible length)

keys
  run           a run folder, an export folder or a checkpoint
  out           where to write (default: <run>/eval)
  weights=ema   ema or last
  device=auto   auto, cpu or cuda;   precision=auto: auto, bf16, 16 or 32
  batch_size=64, num_pictures=12, picture_scale=1
  eval.num_tokens               budgets of a flexible tokenizer, beside JPEG and WebP
  eval.steps, eval.guidance, eval.seed    of a decoder that samples
  data.*        as in training, for example data.val=/photos/val data.val_crop=tv_center
  debug=true    show tracebacks
"""
    )


def export_help() -> None:
    """`export.py --help`."""
    print(
        """Export a tokenizer for other programs: codebooks, weights, a config and a card.

usage: export.py run=runs/<run> out=exported/my_tokenizer [weights=ema] [overwrite=true]

It is read back with vistok.load("exported/my_tokenizer"); the codebooks need safetensors alone.
"""
    )


def import_help() -> None:
    """`import_weights.py --help`."""
    from vistok.core.registry import registered

    print(
        f"""Make an export of weights that others released, under our names.

usage: import_weights.py source=titok weights=FILE out=exported/titok_l32

keys
  source        {", ".join(registered("importer"))}
  weights       a .safetensors, .bin or .pth file; it is read without running code
  out           folder to write
  image_size    for maskgit_vqgan and restok, whose weights take any (published: 256)
  overwrite     replace an export that is there

then
  train.py experiment=titok_l32 stage=proxy stage.proxy=exported/maskgit_vqgan
  train.py experiment=titok_l32 stage=decoder stage.weights=exported/titok_l32
  eval.py run=exported/titok_l32 data=shards data.val=/sets/val-000000.tar
"""
    )


def _listing(group: str, title: str) -> str:
    folders = [config_dir(), *user_config_dirs()]
    lines = [title]
    for name in options(group):
        path = next(f / group / f"{name}.yaml" for f in folders if _has(f, group, name))
        text = header(path)
        lines.append(f"  {name:<20} {text[:76]}")
    return "\n".join(lines)


def _has(folder: Path, group: str, name: str) -> bool:
    return (folder / group / f"{name}.yaml").is_file()
