"""Import released weights: `python scripts/import_weights.py source=titok weights=FILE out=F`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))
from vistok.cli import import_weights

if __name__ == "__main__":
    sys.exit(import_weights())
