"""Values that are replaced while the base optimizer's own step runs."""

from __future__ import annotations

from typing import Any

__all__: list[str] = []

_ABSENT = object()


class Hidden:
    """Replaced values of parameter groups and of optimizers' attributes, all put back by :meth:`restore`."""

    def __init__(self) -> None:
        self._replaced: list[tuple[dict[str, Any], str, Any, Any]] = []

    def replace(self, items: dict[str, Any], name: str, value: Any) -> None:
        """Put ``value`` in the place of what a dict holds under a name."""
        self._replaced.append((items, name, items.get(name, _ABSENT), value))
        items[name] = value

    def restore(self) -> None:
        """Put back the identical objects."""
        while self._replaced:
            items, name, before, _ = self._replaced[-1]
            if before is _ABSENT:
                items.pop(name, None)
            else:
                items[name] = before
            self._replaced.pop()  # last, so that nothing is lost if this is interrupted

    def restore_after_interrupt(self) -> None:
        """Put back what an interrupted step left, unless the user has set it since."""
        self._replaced = [entry for entry in self._replaced if entry[0].get(entry[1]) is entry[3]]
        self.restore()
