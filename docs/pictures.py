"""Draws the pictures of the pages into docs/images.

``python docs/pictures.py`` writes those of how it works. With a base model of criteo_dac80k, as
``python -m examples.ctr.base criteo_dac80k --out FOLDER`` trains it, ``python docs/pictures.py
FOLDER/criteo_dac80k.pt`` writes ratio.svg too; the data are in the folder MEC_EMBED_DATA.
"""

from __future__ import annotations

import sys
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
INK, PALE, BLUE, RED, GREEN = "#24292f", "#eef1f5", "#2f5d8a", "#c0392b", "#3b7d4f"
COLOURS = (BLUE, RED, GREEN)


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "middle") -> str:
    """Words around the point (x, y), or to the right of it with ``anchor="start"``."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, words: str = "") -> str:
    """A rectangle with words in its middle."""
    ink = "#fff" if fill in COLOURS else INK
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" '
    shape += f'stroke="{INK}" stroke-width="0.8"/>'
    label = text(x + width / 2, y + height / 2 + 5, words, 13)
    return shape + label.replace("<text", f'<text fill="{ink}"') if words else shape


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str = INK) -> str:
    """An arrow from (x, y)."""
    line = f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{colour}" '
    return line + 'stroke-width="1.5" marker-end="url(#tip)"/>'


def write(name: str, width: int, height: int, parts: list[str]) -> None:
    """One SVG file; the background is white, for dark pages."""
    tip = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
    tip += f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" font-family="sans-serif" fill="{INK}">'
    back = f'<rect width="{width}" height="{height}" fill="#fff"/>'
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / name).write_text("\n".join([head, tip, back, *parts, "</svg>"]) + "\n")


def row() -> None:
    """One row is the sum of a codeword from each codebook."""
    parts = [text(70, 24, "codes of row 42"), text(356, 24, "codebooks"), text(640, 24, "row 42")]
    chosen = (2, 0, 3)
    for m, (code, colour) in enumerate(zip(chosen, COLOURS, strict=True)):
        top = 42 + 96 * m
        parts.append(box(40, top + 22, 60, 34, colour, str(code)))
        for k in range(4):
            parts.append(text(228, top + 15 + 20 * k, str(k), 11))
            for column in range(8):
                fill = colour if k == code else PALE
                parts.append(box(240 + 29 * column, top + 20 * k, 29, 20, fill))
        parts.append(arrow(104, top + 39, 216, top + 10 + 20 * code))
        parts.append(arrow(478, top + 10 + 20 * code, 520, 178))
    parts += [text(534, 185, "+", 24)]
    parts += [box(556 + 21 * column, 166, 21, 28, "#d9c27a") for column in range(8)]
    parts += [text(640, 216, "8 numbers", 12)]
    parts += [text(92, 340, "3 codes of 2 bits = 6 bits", 12)]
    parts += [text(356, 340, "3 codebooks of 4 codewords, the same for all rows", 12)]
    parts += [text(640, 340, "dense: 8 x 32 = 256 bits", 12)]
    write("row.svg", 750, 356, parts)


def steps() -> None:
    """The steps of ``compress()``."""
    names = ("find", "count", "plan", "learn", "swap", "report")
    below = (
        ("tables of", "the model"),
        ("how often each", "id occurs"),
        ("bytes for", "each table"),
        ("codebooks", "and codes"),
        ("modules and", "optimizers"),
        ("bytes and", "errors"),
    )
    parts = []
    for i, (name, lines) in enumerate(zip(names, below, strict=True)):
        left = 20 + 124 * i
        parts.append(box(left, 30, 90, 40, RED if name == "swap" else BLUE, name))
        parts += [text(left + 45, 92 + 16 * n, line, 12) for n, line in enumerate(lines)]
        if i < 5:
            parts.append(arrow(left + 92, 50, left + 122, 50))
    parts.append(text(252, 142, "nothing has changed yet: an error leaves the model as it was", 12))
    parts.append(text(561, 142, "all at once", 12))
    write("steps.svg", 750, 156, parts)


def tiers() -> None:
    """Popular rows take long codes, others short ones."""
    parts = [text(110, 24, "lookups of each row"), text(310, 24, "map"), text(560, 24, "codes")]
    lengths = (150, 96, 60, 14, 10, 8, 6, 5)
    popular = (True, True, True, False, False, False, False, False)
    for i, (length, head) in enumerate(zip(lengths, popular, strict=True)):
        top = 40 + 26 * i
        parts.append(box(40, top, length, 18, RED if head else PALE))
        parts.append(box(300, top, 20, 18, RED if head else PALE, "1" if head else "0"))
        # Each tier packs its own rows without gaps.
        place = top if head else top + 26
        parts.append(arrow(324, top + 9, 414, place + 9))
        for m in range(6 if head else 2):
            parts.append(box(420 + 30 * m, place, 28, 18, RED if head else PALE))
    parts.append(text(612, 70, "head: popular rows,", 12, "start"))
    parts.append(text(612, 86, "more bits", 12, "start"))
    parts.append(text(500, 190, "tail: the others, fewer bits", 12, "start"))
    write("tiers.svg", 750, 282, parts)


def ratio(model_file: str) -> None:
    """What ``report.plot()`` draws of a plan."""
    from examples.ctr.base import load_base, load_data
    from examples.ctr.training import iterate_batches
    from mec_embed import CompressionConfig, FrequencyStats, plan

    data, (model, _) = load_data("criteo_dac80k"), load_base(model_file)
    batches = list(iterate_batches(data, "train", 2048, shuffle=False))
    stats = FrequencyStats.from_batches(model, batches)
    config = CompressionConfig(ratio=50, codebook_dtype="int8")
    plan(model, stats, config, batches=batches).plot(IMAGES / "ratio.svg")


if __name__ == "__main__":
    row()
    steps()
    tiers()
    if sys.argv[1:]:
        ratio(sys.argv[1])
