"""Check shards against their manifest: `python scripts/check_shards.py /sets/photos`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tokenizers"))
from vistok.tools.check_shards import main

if __name__ == "__main__":
    sys.exit(main())
