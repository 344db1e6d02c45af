"""The benchmark of nights: parts of the data, and what it counts."""

from __future__ import annotations

import copy

import pytest
import torch
from tier_model import shop

from benchmarks.quality import margin, nights
from examples.ctr.generator import generate
from examples.ctr.settings import Settings
from mec_embed.learning import fit


def test_every_example_is_of_one_night() -> None:
    data = generate(examples=2000, fields=2, max_rows=100)
    parts = nights._split(data, 3)
    assert len(parts) == 4
    whole = data.ids["train"]
    assert sum(len(part.labels["train"]) for part in parts) == len(whole)
    seen = torch.cat([part.ids["train"] for part in parts])
    assert torch.equal(seen.unique(dim=0), whole.unique(dim=0))
    assert all(torch.equal(part.ids["test"], data.ids["test"]) for part in parts)


def test_a_line_for_each_night_and_way() -> None:
    data = generate(examples=4000, fields=3, max_rows=500)
    settings = Settings(hidden=(8,), l2=1e-4, dim=8, batch_size=256, epochs=1)
    lines = [*nights.run(data, settings, 8.0, 2, 0)]
    assert [(line["night"], line["how"]) for line in lines] == [
        (night, how) for night in (1, 2) for how in ("cold", "warm")
    ]
    for line in lines:
        assert 0 < line["weighted_error"] < 1 and line["moved"] > 0 and 0 <= line["share"] <= 1
        assert line["changed_rows"] <= line["rows"] and {*line} <= {*nights.COLUMNS}


def test_no_row_changes_of_the_same_model() -> None:
    model = shop(None, 20)[1]
    assert nights.changes(model, copy.deepcopy(model))["changed_rows"] == 0


def test_a_line_for_each_noise_and_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "KEEP_MARGIN", fit.KEEP_MARGIN)  # put back at the end
    lines = [*margin.run(1000, 4, 8.0)]
    assert len(lines) == len(margin.NOISES) * (1 + len(margin.MARGINS))
    by_margin = {line["margin"]: line["share"] for line in lines if line["noise"] == 0.1}
    assert by_margin["cold"] > by_margin[0.0] >= by_margin[0.2] >= by_margin[0.5]
    assert all({*line} <= {*margin.COLUMNS} for line in lines)
