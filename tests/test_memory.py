"""Compressing needs far less memory than the table itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROWS, DIM = 1_000_000, 64
TABLE_MB = ROWS * DIM * 4 / 2**20

SCRIPT = f"""
import sys, time
import numpy as np, torch
from torch import nn
from mec_embed import CompressionConfig, compress
from mec_embed.learning import fit
from mec_embed.learning.kmeans import require_faiss

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024

# One round and a beam of one take no less memory (a chunk has more rows then), but less time.
fit.ROUNDS, fit.LEARNING_BEAM, fit.FINAL_BEAM = 1, 1, 1
require_faiss()
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(1, 1))
model[0] = nn.Embedding({ROWS}, {DIM}, _weight=torch.empty({ROWS}, {DIM}))
for part in model[0].weight.detach().split(1 << 16):
    part.normal_()
counts = {{"0": 1 + {ROWS} // (1 + np.arange({ROWS}))}}
before = status("VmRSS")
started = time.process_time()
report = compress(
    model, counts, CompressionConfig(ratio=50, epochs=1), progress=False
)
print(before, status("VmHWM"), report.bytes_before / report.bytes_after,
      report.tables[0].layout, time.process_time() - started, sep=";")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_compress_takes_less_than_half_the_table_and_200_mb() -> None:
    # VmHWM, not ru_maxrss: that one is inherited from the parent over fork and exec.
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr
    before, peak, ratio, layout, seconds = run.stdout.strip().split(";")
    rise = float(peak) - float(before)
    print(f"{layout}: {rise:.0f} MB above {float(before):.0f} MB, {float(seconds):.0f} s of CPU")
    assert float(before) > TABLE_MB, "the table was not in memory before"
    assert float(ratio) >= 50
    assert 0 < rise < TABLE_MB / 2 + 200
