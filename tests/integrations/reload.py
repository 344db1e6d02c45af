"""In a fresh process: rebuild models, load what was saved, write predictions.

``python reload.py ZOO FOLDER NAME...`` writes ``FOLDER/NAME.npy`` for each name.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import torch

import mec_embed


def main() -> None:
    """Load each model by mec_embed, then strictly by the framework's own state dict."""
    zoo, folder = importlib.import_module(sys.argv[1]), Path(sys.argv[2])
    for name in sys.argv[3:]:
        file = folder / f"{name.replace(' ', '_')}.safetensors"
        model = mec_embed.load(zoo.build(name, folder), file)
        first = zoo.predict(model, name, folder)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        model.load_state_dict(torch.load(file.with_suffix(".pt"), weights_only=True), strict=True)
        second = zoo.predict(model, name, folder)
        np.save(file.with_suffix(".npy"), np.stack([first, second]))


if __name__ == "__main__":
    main()
