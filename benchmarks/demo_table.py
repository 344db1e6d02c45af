"""The README's tables, from the result files that ``python -m examples.demo --json`` wrote.

``python -m benchmarks.demo_table benchmarks/results/demo_*.json`` prints them as Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.lines import signed

STAGES = ("uncompressed", "compressed", "distilled", "reloaded")


def main() -> None:
    """Read the files, print the short and the long table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    results = [json.loads(file.read_text()) for file in parser.parse_args().files]
    print(short_table(results))
    print()
    print(long_table(results))
    print()
    print("\n".join(sorted({_conditions(result) for result in results})))


def short_table(results: list[dict[str, Any]]) -> str:
    """One line a data set: bytes before and after, AUC and its change."""
    lines = [
        "| data | embedding bytes | after | ratio | test AUC | right after | distilled |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        before, after = (_mean(result, stage, "embedding_bytes") for stage in STAGES[:2])
        auc = [_mean(result, stage, "auc") for stage in STAGES[:3]]
        lines.append(
            f"| {result['data']} | {before:,.0f} | {after:,.0f} | {before / after:.1f} | "
            f"{auc[0]:.4f} | {signed(auc[1] - auc[0])} | {signed(auc[2] - auc[0])} |"
        )
    return "\n".join(lines)


def long_table(results: list[dict[str, Any]]) -> str:
    """One line a data set and stage."""
    lines = [
        "| data | seeds | stage | test AUC | logloss | embedding bytes | file bytes | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for stage in STAGES:
            size = _mean(result, stage, "file_bytes")
            lines.append(
                f"| {result['data']} | {len(result['runs'])} | {stage} | "
                f"{_mean(result, stage, 'auc'):.4f} | {_mean(result, stage, 'logloss'):.4f} | "
                f"{_mean(result, stage, 'embedding_bytes'):,.0f} | "
                f"{f'{size:,.0f}' if size else '-'} | {_mean(result, stage, 'seconds'):.1f} |"
            )
    return "\n".join(lines)


def _mean(result: dict[str, Any], stage: str, value: str) -> float:
    """Mean over the runs of one figure of one stage; 0 where there is none."""
    found = [
        entry[value] or 0
        for run in result["runs"]
        for entry in run["stages"]
        if entry["stage"] == stage
    ]
    return mean(found)


def _conditions(result: dict[str, Any]) -> str:
    return (
        f"mec_embed {result['mec_embed']}, torch {result['torch']}, Python {result['python']}, "
        f"{_number(result['threads'], 'thread')} on {result['cores']} cores of "
        f"{result['processor']}; dim {result['settings']['dim']}, "
        f"codebooks {result['codebook_dtype']}, "
        f"{_number(result['settings']['distill_epochs'], 'epoch')} of distillation"
    )


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


if __name__ == "__main__":
    main()
