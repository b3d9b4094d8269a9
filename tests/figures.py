"""Numbers in prose: a README may quote them in whatever words, but they must be those of the results."""

import re


def figures_of(text: str) -> list[str]:
    """Return all numbers of a text, in order: '10,000' is one, and so is '0.5'."""
    return re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)


def quotes(text: str, *figures: object) -> bool:
    """Tell whether a text has these numbers one after the other, with nothing but words in between."""
    expected, found = [str(figure) for figure in figures], figures_of(text)
    return any(found[i : i + len(expected)] == expected for i in range(len(found)))
