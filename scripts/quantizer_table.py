"""Write the guide's page of quantizers: `python scripts/quantizer_table.py [--check]`."""

import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tokenizers"))
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from vistok.core.registry import build  # noqa: E402
from vistok.quantizers.base import Quantizer  # noqa: E402

CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "guide" / "quantizers.md"
WIDTH, GRID = 256, (16, 16)  # the latents that the numbers are for

HEADER = f"""# Quantizers

Written by `scripts/quantizer_table.py` from `configs/quantizer/` and the classes' docstrings; do
not edit. Choose one with `quantizer=<name>`; every key of its file can be set on the command line,
for example `quantizer=vq quantizer.codebook_size=8192`. The file says when to use it and what it
costs, the class says how it works.

Quantizers with scales (`var`, `image_folder`, `token_flow_multi_scale`) work on the grid that the
encoder names: rows and columns of a 2D tokenizer, square or not, and a line for a 1D code.
`quantizer.grid=[rows,columns]` lays the tokens out in another way.

Numbers are for {GRID[0]} x {GRID[1]} latents of width {WIDTH}. *Ids* and *bits* are per latent;
multi-scale quantizers have more ids than latents. *State* is the number of learned values and of
other saved ones (statistics, EMA codebooks), with the projections to and from the code width.

| `quantizer=` | What it is | Class | Paper | Ids | Bits | State |
|---|---|---|---|---|---|---|
"""


def render() -> str:
    """The whole page."""
    return HEADER + "".join(_row(path) for path in sorted((CONFIGS / "quantizer").glob("*.yaml")))


def _row(path: Path) -> str:
    quantizer = _build(path.stem)
    comments = re.match(r"(?:#.*\n)*", path.read_text())
    header = comments.group().replace("\n#", "\n") if comments else ""
    doc = type(quantizer).__doc__ or ""
    what = (header.lstrip("#") or doc).strip().split("\n")[0]
    papers = re.findall(r"https?://[^\s,;)]*[^\s,;).]", header) or re.findall(
        r"https?://[^\s,;)]*[^\s,;).]", doc
    )
    links = ", ".join(f"[{paper.rsplit('/', 1)[-1]}]({paper})" for paper in dict.fromkeys(papers))
    longer = quantizer.num_index_tokens(math.prod(GRID), GRID) / math.prod(GRID)
    learned = sum(each.numel() for each in quantizer.parameters())
    saved = sum(each.numel() for each in quantizer.state_dict().values()) - learned
    cells = [
        f"`{path.stem}`",
        what.rstrip("."),
        f"`{type(quantizer).__name__}`",
        links,
        f"{quantizer.num_indices * longer:.4g}",
        f"{quantizer.bits_per_token * longer:.4g}",
        f"{_short(learned)} + {_short(saved)}",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _build(name: str) -> Quantizer:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        overrides = [f"+quantizer={name}", f"++tokenizer.latent_dim={WIDTH}"]
        config = OmegaConf.to_container(compose(overrides=overrides), resolve=True)
    assert isinstance(config, dict)
    return build(config["quantizer"])


def _short(count: int) -> str:
    """Three digits: 0, 512, 16.4k, 4.19M."""
    if count < 1000:
        return str(count)
    power = int(math.log10(count)) // 3
    return f"{count / 1000**power:.3g}{' kMG'[power]}"


if __name__ == "__main__":
    page = render()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text() == page else f"{PAGE.name} is out of date")
    PAGE.write_text(page)
