"""A plugin of pytest: one of several processes that share the tests, without pytest-xdist, which may not be there.

``SHARD=0/4 python -m pytest -p benchmarks.gpu_check.shard ...``
"""

from __future__ import annotations

import os
from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep every n-th test. Neighbours are alike, and so their load is spread."""
    index, count = map(int, os.environ["SHARD"].split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index])
    items[:] = items[index::count]
