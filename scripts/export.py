"""Export a tokenizer: uv run scripts/export.py run=runs/<run> out=exported/my_tokenizer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizers"))
from vistok.cli import export

if __name__ == "__main__":
    sys.exit(export())
