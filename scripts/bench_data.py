"""Measure the data stream: `python scripts/bench_data.py SHARDS image_size=256`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tokenizers"))
from vistok.tools.bench_data import main

if __name__ == "__main__":
    sys.exit(main())
