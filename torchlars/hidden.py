"""Values that are replaced while the base optimizer's own step runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__: list[str] = []

_ABSENT = object()


class Hidden:
    """Replaced values of parameter groups and of optimizers' attributes, all put back by :meth:`restore`."""

    def __init__(self) -> None:
        self._replaced: list[tuple[dict[str, Any], str, Any, Any]] = []

    def replace(self, replacements: Iterable[tuple[dict[str, Any], str, Any]]) -> None:
        """Put other values into dicts, given triples of a dict, a key and its value."""
        added = [(items, key, items.get(key, _ABSENT), value) for items, key, value in replacements]
        self._replaced += added  # before anything is written, in case this is interrupted
        for items, key, _, value in added:
            items[key] = value

    def restore(self) -> None:
        """Put back the identical objects."""
        for items, key, before, _ in reversed(self._replaced):
            if before is _ABSENT:
                items.pop(key, None)
            else:
                items[key] = before
        self._replaced.clear()  # at the end, in case this is interrupted

    def restore_after_interrupt(self) -> None:
        """Put back what an interrupted step left, unless the user has set it since."""
        if self._replaced:
            self._replaced = [entry for entry in self._replaced if entry[0].get(entry[1]) is entry[3]]
            self.restore()
