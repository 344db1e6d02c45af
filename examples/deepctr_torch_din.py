"""A DIN of DeepCTR-Torch: train it, compress it with two lines, train on, save and reload.

``python -m examples.deepctr_torch_din`` takes a minute or two on a CPU; ``--tiny`` some seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DIN

import mec_embed
from mec_embed import CompressionConfig
from mec_embed.integrations import deepctr

SIZES = {"user": 20_000, "item": 20_000, "category": 200}
HISTORY, DIM = 10, 16


def main() -> None:
    """Run all stages and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="few examples, for a quick check")
    examples = 8_000 if parser.parse_args().tiny else 200_000
    (x_train, y_train), test = click_log(examples, seed=1), click_log(examples // 5, seed=2)

    model = build_model()
    model.fit(x_train, y_train, batch_size=512, epochs=3, verbose=0)
    rows = [measure("trained", model, *test)]

    report = deepctr.compress(model, x_train, CompressionConfig(ratio=20))
    rows.append(measure("compressed", model, *test))

    model.fit(x_train, y_train, batch_size=512, epochs=1, verbose=0)
    rows.append(measure("trained on", model, *test))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "din.safetensors"
        mec_embed.save(model, file)
        rows.append(measure("reloaded", mec_embed.load(build_model(), file), *test))

    print(f"\n{report}\n\n{'':12}{'test AUC':>10}{'logloss':>10}{'embedding bytes':>18}")
    for stage, auc, logloss, size in rows:
        print(f"{stage:12}{auc:10.4f}{logloss:10.4f}{size:18,}")


def build_model() -> DIN:
    """A compiled DIN; histories share the tables of items and categories."""
    columns = [SparseFeat(name, 1 + size, DIM) for name, size in SIZES.items()]
    for name in ("item", "category"):
        shared = SparseFeat(f"hist_{name}", 1 + SIZES[name], DIM, embedding_name=name)
        columns.append(VarLenSparseFeat(shared, HISTORY, length_name="hist_length"))
    model = DIN(
        columns,
        ["item", "category"],
        dnn_hidden_units=(64, 32),
        att_hidden_size=(32, 16),
        dnn_dropout=0.5,
        l2_reg_embedding=3.0,  # large, for fit sums the loss over the batch
        init_std=0.01,
    )
    model.compile("adam", "binary_crossentropy", metrics=["auc", "binary_crossentropy"])
    return model


def measure(stage: str, model: DIN, x: dict, y: np.ndarray) -> tuple[str, float, float, int]:
    """Stage, AUC, log loss, and bytes of all tensors of the tables."""
    found = model.evaluate(x, y, batch_size=4096)
    tables = model.embedding_dict
    size = sum(tensor.nbytes for tensor in [*tables.parameters(), *tables.buffers()])
    return stage, found["auc"], found["binary_crossentropy"], size


def click_log(examples: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features and clicks; ids are Zipf distributed, and 0 is padding.

    Each user favours three categories. Clicks follow the affinity of the history's categories to
    the item's, and the item and the user.
    """
    planted = np.random.default_rng(0)  # the same world for every log
    users, items, categories = SIZES.values()
    favourites = planted.integers(categories, size=(users, 3))
    taste = planted.normal(size=(categories, 3))
    item_bias, user_bias = planted.normal(size=items), planted.normal(size=users)

    rng = np.random.default_rng(seed)
    user = zipf(rng, users, (examples, 1))
    slots = (examples, HISTORY + 1)  # the history, and the item that is shown
    favourite = favourites[user, rng.integers(3, size=slots)]
    category = np.where(rng.random(slots) < 0.6, favourite, zipf(rng, categories, slots))
    item = category + categories * zipf(rng, items // categories, slots)
    length = rng.integers(1, HISTORY + 1, size=(examples, 1))
    seen = np.arange(HISTORY) < length

    interest = (seen[..., None] * taste[category[:, :-1]]).sum(1) / length
    affinity = (interest * taste[category[:, -1]]).sum(1)
    logit = 1.5 * affinity + 0.7 * item_bias[item[:, -1]] + 0.4 * user_bias[user[:, 0]] - 1
    clicks = rng.random(examples) < 1 / (1 + np.exp(-logit))
    x = {"user": 1 + user, "hist_length": length}
    for name, ids in (("item", 1 + item), ("category", 1 + category)):
        x |= {name: ids[:, -1:], f"hist_{name}": np.where(seen, ids[:, :-1], 0)}
    return x, clicks.astype(np.float32)


def zipf(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> np.ndarray:
    """Ids in [0, size), with chances proportional to 1 / (1 + id)."""
    chances = np.cumsum(1 / np.arange(1, size + 1))
    return np.searchsorted(chances, rng.random(shape) * chances[-1], side="right")


if __name__ == "__main__":
    main()
