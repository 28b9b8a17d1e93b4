"""Write images as shards: `python scripts/make_shards.py /photos out=/sets/photos`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tokenizers"))
from vistok.tools.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
