"""Write images as shards: `uv run scripts/make_shards.py /photos out=/sets/photos`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))
from vistok.cli import make_shards

if __name__ == "__main__":
    sys.exit(make_shards())
