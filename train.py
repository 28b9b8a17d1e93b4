"""Train a tokenizer: uv run train.py experiment=titok_tiny trainer.max_steps=500."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "tokenizers"))
from vistok.cli import train

if __name__ == "__main__":
    sys.exit(train())
