"""A folder for each framework's data, and its saved models reloaded in one fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all models of a framework."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def reload(folder):
    """Reloads models in one fresh process: call with a zoo's name and models' names."""

    def run(zoo: str, names: list[str]) -> dict[str, np.ndarray]:
        here = Path(__file__).parent
        command = [sys.executable, str(here / "reload.py"), zoo, str(folder), *names]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here.parents[1])
        assert done.returncode == 0, done.stderr[-4000:]
        return {name: np.load(folder / f"{name.replace(' ', '_')}.npy") for name in names}

    return run
