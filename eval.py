"""Evaluate a tokenizer: uv run eval.py run=runs/<run>."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "tokenizers"))
from vistok.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
