"""Measure the data stream: `uv run scripts/bench_data.py SHARDS image_size=256`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))
from vistok.cli import bench_data

if __name__ == "__main__":
    sys.exit(bench_data())
