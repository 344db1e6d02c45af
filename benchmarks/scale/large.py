"""Compress a table that is larger than memory; append what it took to a CSV file.

``python -m benchmarks.scale.large --rows 80000000 --dim 64`` makes a table of 20 GB on the disk,
in pieces, and runs ``mec-embed compress`` on it in a process of its own. Its memory is sampled:
anonymous memory, less that of an interpreter that has only imported the same libraries, is what
the table costs; pages of files, which the system can drop, are told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append

COLUMNS = (
    "rows", "dim", "table_gb", "ratio", "counts", "options", "seconds", "anonymous_mb",
    "interpreter_mb", "above_mb", "file_mb", "output_bytes", "error", "mec_embed", "torch",
    "python", "processor", "threads",
)  # fmt: skip
#: Rows made at once.
PIECE = 1 << 18
#: Seconds between two samples of memory.
SAMPLE_SECONDS = 0.05
#: What ``mec-embed compress`` imports; the rest is the table's.
IMPORTS = "import mec_embed.cli, faiss; print(open('/proc/self/status').read())"


def main() -> None:
    """Parse the command line and run."""
    options = _parse()
    if not Path("/proc/self/status").exists():
        sys.exit("memory is read from /proc, which is not here")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mec_embed_scale_") as name:
        line = measure(options, Path(name))
    append(options.out, line, COLUMNS)
    print(json.dumps(line, indent=2))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the table, compress it, and say what it took."""
    table, counts, output = (folder / name for name in ("table.safetensors", "counts.npz", "small"))
    nbytes = options.rows * options.dim * 4
    if nbytes * 1.2 > shutil.disk_usage(folder).free:
        sys.exit(f"a table of {nbytes:,} bytes does not fit into {folder}")
    make_table(table, options.rows, options.dim)
    command = [sys.executable, "-m", "mec_embed", "compress", str(table), "-o", str(output)]
    command += ["--ratio", str(options.ratio), "--json", *options.options.split()]
    if options.counts != "none":
        make_counts(counts, options.rows, options.counts == "shuffled")
        command += ["--freq", str(counts)]
    interpreter = _interpreter_mb()
    started = time.perf_counter()
    peak, told = watch(command)
    table_report = told["report"]["tables"][0]
    return {
        "rows": options.rows,
        "dim": options.dim,
        "table_gb": round(nbytes / 1e9, 3),
        "ratio": round(told["report"]["ratio"], 2),
        "counts": options.counts,
        "options": options.options,
        "seconds": round(time.perf_counter() - started, 1),
        "anonymous_mb": round(peak["RssAnon"]),
        "interpreter_mb": round(interpreter),
        "above_mb": round(peak["RssAnon"] - interpreter),
        "file_mb": round(peak["RssFile"]),
        "output_bytes": told["bytes"],
        "error": round(table_report["weighted_error"], 5),
        "mec_embed": mec_embed.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
    }


def make_table(path: Path, rows: int, dim: int) -> None:
    """A safetensors file with one float32 table of a falling spectrum, written in pieces."""
    nbytes = rows * dim * 4
    entry = {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, nbytes]}
    header = json.dumps({"embedding.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((dim, dim), dtype=np.float32)
    scales = (1 / np.arange(1, dim + 1)).astype(np.float32)[:, None]
    with open(path, "wb") as file, tqdm(total=rows, desc="making", unit="row") as bar:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, rows, PIECE):
            count = min(PIECE, rows - start)
            piece = generator.standard_normal((count, dim), dtype=np.float32) @ (scales * mixing)
            file.write(piece.tobytes())
            bar.update(count)


def make_counts(path: Path, rows: int, shuffled: bool) -> None:
    """Zipf counts as numpy.savez writes them, in pieces; by rank, or spread over all rows."""
    # Odd and no multiple of small primes: a permutation for most numbers of rows, near to one else.
    step = 2_654_435_761 if shuffled else 1
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        archive.open("embedding.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": "<i8", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, PIECE):
            ids = np.arange(start, min(start + PIECE, rows), dtype=np.int64)
            file.write((rows // (1 + ids * step % rows)).tobytes())


def watch(command: list[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Run a command; the peaks of its memory in MB, and the JSON that it prints."""
    peak = {"RssAnon": 0.0, "RssFile": 0.0}
    with (
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen(command, stdout=out) as process,
    ):
        while process.poll() is None:
            now = memory_of(process.pid)
            peak = {name: max(value, now.get(name, 0.0)) for name, value in peak.items()}
            time.sleep(SAMPLE_SECONDS)
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed with {process.returncode}")
        out.seek(0)
        return peak, json.load(out)


def memory_of(pid: int) -> dict[str, float]:
    """Fields of /proc/PID/status that are sizes, in MB; none where the process is gone."""
    try:
        return _sizes(Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return {}


def _sizes(status: str) -> dict[str, float]:
    fields = (line.split() for line in status.splitlines() if line.endswith(" kB"))
    return {name.rstrip(":"): int(value) / 1024 for name, value, _ in fields}


def _interpreter_mb() -> float:
    """Anonymous memory of a process that only imports."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    return _sizes(run.stdout)["RssAnon"]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=50.0)
    parser.add_argument("--counts", choices=("sorted", "shuffled", "none"), default="shuffled")
    parser.add_argument("--options", default="", help="more options of mec-embed compress")
    parser.add_argument("--folder", type=Path, help="for the table (default: the system's)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale_large.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
