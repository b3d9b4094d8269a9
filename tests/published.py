"""Numbers that other implementations of LARS produced (published.json)."""

import json
from pathlib import Path

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
