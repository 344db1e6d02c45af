"""Files of results: one line a measurement."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append(path: Path, line: Mapping[str, Any], columns: Sequence[str]) -> None:
    """One more line of a CSV file, which is made with its folder where it is not there."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(line)


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def signed(change: float) -> str:
    """Four digits; no sign where they are all zero."""
    text = f"{change:+.4f}"
    return text if text.strip("+-0.") else text[1:]
