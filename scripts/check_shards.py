"""Check shards against their manifest: `uv run scripts/check_shards.py /sets/photos`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))
from vistok.cli import check_shards

if __name__ == "__main__":
    sys.exit(check_shards())
