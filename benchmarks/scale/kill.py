"""Kill ``mec-embed compress`` at random points and see that nothing is lost or half done.

``python -m benchmarks.scale.kill`` kills 100 runs (SIGKILL) after random times, each going on from
what the runs before have finished, and appends what happened to a CSV file. The input must stay as
it is, the output must be absent or the same, to the byte, as that of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import mec_embed
from benchmarks.hardware import processor
from benchmarks.lines import append
from mec_embed.cli import main as main_of_the_command_line

COLUMNS = (
    "kills", "seed", "tables", "with_finished", "finished", "resumed", "wrong", "seconds",
    "mec_embed", "torch", "python", "processor", "threads",
)  # fmt: skip

#: Rows of the tables; dimensions differ, so that each is learned on its own.
ROWS, TABLES = 2000, 6
POLL_SECONDS = 0.002
#: Imports take longer than all the rest: they are done once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["mec_embed.cli", "faiss", "torch._dynamo"])


@dataclass
class Figures:
    """What happened.

    Attributes:
        kills: runs that were killed.
        with_finished: kills that left finished groups behind.
        finished: runs that were done before they were killed, or were let go on to the end.
        resumed: finished runs that used what killed ones had left.
        wrong: what must not happen.
        seconds: in all.
    """

    kills: int = 0
    with_finished: int = 0
    finished: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scale_kill.csv"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mec_embed_kill_") as name:
        figures = kill(Path(name), options.kills, options.seed)
    line = line_of(figures, options.seed)
    append(options.out, line, COLUMNS)
    print(json.dumps(line, indent=2))
    sys.exit(1 if figures.wrong else 0)


def line_of(figures: Figures, seed: int) -> dict[str, Any]:
    """What happened, and where."""
    return {
        **asdict(figures),
        "wrong": "; ".join(figures.wrong),
        "seed": seed,
        "tables": TABLES,
        "mec_embed": mec_embed.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
    }


def kill(folder: Path, kills: int, seed: int = 0, tables: int = TABLES) -> Figures:
    """Kill so many runs, in an empty folder."""
    figures, started = Figures(), time.perf_counter()
    inputs, output = make_inputs(folder, tables), folder / "small.safetensors"
    before = _digests(inputs)
    run = _Run(inputs, output)
    run.wait_for_work()
    working = time.perf_counter()
    code, said = run.end()
    working = time.perf_counter() - working
    if code:
        sys.exit(f"a run that nobody killed failed: {said}")
    whole = output.read_bytes()
    output.unlink()
    times = random.Random(seed)
    with tqdm(total=kills, unit="kill") as bar:
        while figures.kills < kills and not figures.wrong:
            run = _Run(inputs, output)
            run.wait_for_work()
            run.process.join(times.uniform(0, working))
            run.process.kill()
            run.process.join()
            if run.process.exitcode == -signal.SIGKILL:
                _killed(output, whole, figures)
                bar.update()
            else:
                _finished(run, whole, figures)
            if _digests(inputs) != before:
                figures.wrong.append("the input was changed")
    _finished(_Run(inputs, output), whole, figures)
    figures.seconds = round(time.perf_counter() - started, 1)
    return figures


def make_inputs(folder: Path, tables: int) -> list[Path]:
    """A checkpoint of some small tables and a layer, and counts."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"embedding.field {number}.weight": torch.randn(ROWS, 4 + number, generator=generator)
        for number in range(tables)
    }
    tensors["mlp.weight"] = torch.randn(64, 64, generator=generator)
    tensors["mlp.bias"] = torch.randn(64, generator=generator)
    checkpoint, counts = folder / "model.safetensors", folder / "counts.npz"
    save_file(tensors, checkpoint)
    np.savez(counts, **{"embedding.*": ROWS // (1 + np.arange(ROWS))})
    return [checkpoint, counts]


class _Run:
    """One run of the command line, forked from a process that has imported all it needs."""

    def __init__(self, inputs: list[Path], output: Path) -> None:
        self.output, self.told = output, output.parent.with_name(f"{output.parent.name}.told")
        argv = ["compress", str(inputs[0]), "--quiet", "--json", "-o", str(output)]
        argv += ["--freq", str(inputs[1]), "--ratio", "16", "--epochs", "1"]
        self._began = time.time()
        self.process = _FORKS.Process(target=_main, args=(argv, str(self.told)))
        self.process.start()

    def wait_for_work(self) -> None:
        """Until the run has read its input and goes on to the tables."""
        lock = self.output.with_name(f"{self.output.name}.partial") / "lock"
        while self.process.is_alive():
            if lock.exists() and lock.stat().st_mtime >= self._began - 0.02:
                return
            time.sleep(POLL_SECONDS)

    def end(self) -> tuple[int | None, str]:
        """Exit code, and what the run has printed."""
        self.process.join()
        said = self.told.read_text()
        self.told.unlink()
        return self.process.exitcode, said


def _main(argv: list[str], told: str) -> None:
    with open(told, "w") as sys.stdout, open(told, "a") as sys.stderr:
        sys.exit(main_of_the_command_line(argv))


def _finished(run: _Run, whole: bytes, figures: Figures) -> None:
    """A run that came to its end: the same bytes, and nothing else left."""
    code, said = run.end()
    if code:
        figures.wrong.append(f"a run failed: {said}")
        return
    figures.finished += 1
    figures.resumed += json.loads(said)["resumed_groups"] > 0
    if run.output.read_bytes() != whole:
        figures.wrong.append("a finished run has written other bytes")
    left = {path.name for path in run.output.parent.iterdir()}
    if left != {run.output.name, "model.safetensors", "counts.npz"}:
        figures.wrong.append(f"a finished run has left {sorted(left)}")
    run.output.unlink()


def _killed(output: Path, whole: bytes, figures: Figures) -> None:
    """A run that was killed: the output is absent or whole."""
    figures.kills += 1
    work = output.with_name(f"{output.name}.partial")
    figures.with_finished += any(work.glob("*.group"))
    if output.exists() and output.read_bytes() != whole:
        figures.wrong.append("a killed run has left an output that is not whole")


def _digests(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


if __name__ == "__main__":
    main()
