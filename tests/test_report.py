"""The report: text within its width, sums, dict and JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mec_embed import CompressionConfig, CompressionReport, TableReport, compress, plan
from mec_embed.tiers import TieredEmbedding


def _table(**options: object) -> TableReport:
    values: dict[str, object] = {
        "name": "table",
        "aliases": (),
        "rows": 1000,
        "dim": 16,
        "dtype": "float32",
        "layout": "additive 5x32",
        "row_bits": 25,
        "bytes_before": 64_000,
        "code_bytes": 3133,
        "codebook_bytes": 1024,
        "other_bytes": 0,
    }
    return TableReport(**{**values, **options})  # type: ignore[arg-type]


def _report(*tables: TableReport, **options: object) -> CompressionReport:
    return CompressionReport(tables, CompressionConfig(), **options)  # type: ignore[arg-type]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "large": nn.Embedding(3000, 16),
            "first": nn.Embedding(3000, 1),
            "bag": nn.EmbeddingBag(900, 8),
            "left_out": nn.Embedding(500, 4),
            "tiny": nn.Embedding(10, 4),
            "normed": nn.Embedding(200, 4, max_norm=1.0),
        }
    )


COUNTS = {"large": np.arange(3000) + 1.0, "first": np.arange(3000) + 1.0}
OPTIONS = CompressionConfig(ratio=7, exclude=("left*",), min_rows=128, epochs=1)


@pytest.fixture(scope="module")
def reports() -> tuple[CompressionReport, CompressionReport]:
    """What is planned, and what is done."""
    model = _model()
    return plan(model, COUNTS, OPTIONS), compress(model, COUNTS, OPTIONS, progress=False)


# --- text ---------------------------------------------------------------------------------------


def test_text_of_a_known_report() -> None:
    report = _report(
        _table(weighted_error=0.1234, perplexity=20.4, codewords=160, dead_codes=3),
        _table(name="other", code_bytes=0, codebook_bytes=0, shares_codes_with="table"),
        _table(name="left", reason="is empty", code_bytes=0, codebook_bytes=0, other_bytes=500),
        notes=("take care",),
        seconds=1.25,
    )
    lines = str(report).splitlines()
    assert lines[0].split() == [
        *("table", "rows", "dim", "layout", "bits", "before", "codes", "books", "other"),
        *("ratio", "error", "used", "dead"),
    ]
    first = "table 1000 16 additive 5x32 25 64000 3133 1024 0 15.4 0.123 20 3"
    assert lines[1].split() == first.split()
    assert lines[2].split() == "other 1000 16 additive 5x32 25 64000 0 0 0 shared - - -".split()
    assert lines[3].split() == ["total", "3000", "192000", "3133", "1024", "500", "41.2"]
    assert lines[4] == "192,000 -> 4,657 bytes, ratio 41.23, 1.2 s"
    assert lines[5] == "as it was: left (1000 x 16, 500 bytes): is empty"
    assert lines[6] == "note: take care"
    assert len(lines) == 7


def test_columns_are_aligned() -> None:
    report = _report(_table(), _table(name="a" * 20, rows=12_345_678, layout="product 16x256"))
    header, *body = str(report).splitlines()[:4]
    for title in ("rows", "before", "codes", "books", "other", "dead"):
        end = header.index(title) + len(title)
        assert all(line[end : end + 1] in ("", " ") for line in body)
    rows = header.index("rows") + 4
    assert [line[:rows].split()[-1] for line in body] == ["1000", "12345678", "12346678"]
    assert "0" * 5 not in header and not any(line != line.rstrip() for line in body)


BILLIONS = {
    "rows": 4_000_000_000,
    "dim": 1024,
    "row_bits": 400,
    "layout": "product 256x65536",
    "bytes_before": 16_384_000_000_000,
    "code_bytes": 200_000_000_008,
    "codebook_bytes": 268_435_456,
    "other_bytes": 0,
    "weighted_error": 0.123,
    "perplexity": 61234.5,
    "codewords": 1 << 24,
    "dead_codes": 1 << 20,
}


@pytest.mark.parametrize("name", ["t", "a.very.long.module.path." * 8 + "user_id", "ü" * 200])
@pytest.mark.parametrize("count", [1, 3])
def test_text_fits_120_columns(name: str, count: int) -> None:
    skipped = _table(name=name, reason="because of a reason that is long " * 10, rows=10**12)
    note = "no counts for " + ", ".join(f"table_{i}" for i in range(60))
    report = _report(*[_table(name=name, **BILLIONS)] * count, skipped, notes=(note, "x" * 500))
    text = str(report)
    assert max(map(len, text.splitlines())) <= 120
    assert name[-8:] in text and "table_59" in text and str(BILLIONS["bytes_before"]) in text
    assert str(BILLIONS["code_bytes"]) in text and "product 256x65536" in text


def test_layouts_give_way_where_all_numbers_are_wide() -> None:
    wide = _table(
        name="_",
        rows=10**10,
        row_bits=512,
        bytes_before=10**13,
        code_bytes=10**12,
        codebook_bytes=10**11,
        other_bytes=10**11,
        dim=4096,
        layout="product 256x65536",
        perplexity=65536.0,
        codewords=65536,
        dead_codes=65536,
    )
    text = str(_report(wide, wide, wide))
    assert max(map(len, text.splitlines())) <= 120 and "65536" in text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            _table,
            name=st.text("abc._", min_size=1, max_size=150),
            rows=st.integers(1, 10**10),
            dim=st.integers(1, 4096),
            row_bits=st.integers(0, 512),
            bytes_before=st.integers(1, 10**13),
            code_bytes=st.integers(0, 10**12),
            codebook_bytes=st.integers(0, 10**11),
            other_bytes=st.integers(1, 10**11),
            layout=st.sampled_from(["additive 32x2048", "rows float16", "product 256x65536"]),
            weighted_error=st.none() | st.floats(0, 1),
            dead_codes=st.none() | st.integers(0, 65536),
            reason=st.none() | st.text(" abc", min_size=1, max_size=300),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_text_of_any_report_fits_and_names_its_totals(tables: list[TableReport]) -> None:
    report = _report(*tables)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 120
    assert f"{report.bytes_before:,} -> {report.bytes_after:,} bytes" in str(report)


def test_long_names_keep_their_end() -> None:
    text = str(_report(_table(name="x" * 200 + ".user_id")))
    assert "x.user_id" in text and "..." in text and "x" * 40 not in text


# --- sums ---------------------------------------------------------------------------------------


def test_totals_add_up(reports: tuple[CompressionReport, CompressionReport]) -> None:
    model = _model()
    dense = sum(p.nbytes for p in model.parameters())
    for report in reports:
        assert report.bytes_before == dense
        parts = [
            t.code_bytes + t.codebook_bytes + t.other_bytes == t.bytes_after for t in report.tables
        ]
        assert all(parts)
        assert report.bytes_after == sum(t.bytes_after for t in report.tables)
        assert report.ratio == report.bytes_before / report.bytes_after >= 7
        assert [t.name for t in report.tables] == list(model.keys())


def test_bytes_after_are_those_of_the_tensors() -> None:
    model = _model()
    report = compress(model, COUNTS, OPTIONS, progress=False)
    unique = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    assert sum(unique.values()) == report.bytes_after


def test_ratio_of_one_table() -> None:
    whole = plan(_model(), COUNTS, dataclasses.replace(OPTIONS, tiers=False))
    (table,) = (t for t in whole.tables if t.name == "large")
    assert table.bytes_before == 3000 * 16 * 4
    assert table.code_bytes == (3000 * table.row_bits + 7) // 8 + 8


def test_a_table_in_tiers_shows_both_and_counts_its_map() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"large": nn.Embedding(3000, 16), "first": nn.Embedding(3000, 1)})
    counts = np.where(np.arange(3000) < 300, 1000, 1)
    config = CompressionConfig(ratio=60, epochs=0)
    report = compress(model, dict.fromkeys(model, counts), config, progress=False)
    large, first = report.tables
    module = model["large"]
    assert isinstance(module, TieredEmbedding)
    layouts = [tier.layout for tier in module.tiers]
    assert large.layout == f"{layouts[0].describe()} | {layouts[1].describe()}"
    assert large.layout in str(report)
    bits = [layout.row_bits * layout.num_embeddings for layout in layouts]
    assert large.row_bits == round(sum(bits) / 3000)
    assert large.code_bytes == sum(layout.code_bytes for layout in layouts)
    assert large.other_bytes == module.tier_map.nbytes > 0
    assert first.shares_codes_with == "large" and first.other_bytes == first.code_bytes == 0


# --- dict and JSON ------------------------------------------------------------------------------


def test_dict_and_json(reports: tuple[CompressionReport, CompressionReport]) -> None:
    for report in reports:
        values = report.to_dict()
        assert json.loads(report.to_json()) == json.loads(json.dumps(values))
        assert values["bytes_after"] == report.bytes_after and values["ratio"] == report.ratio
        assert values["notes"] == list(report.notes)
        tables = []
        for table in json.loads(report.to_json())["tables"]:
            after = table.pop("bytes_after")
            tables.append(TableReport(**{**table, "aliases": tuple(table["aliases"])}))
            assert tables[-1].bytes_after == after
        again = CompressionReport(
            tuple(tables),
            CompressionConfig.from_dict(values["config"]),
            tuple(values["notes"]),
            values["seconds"],
            values["predicted_error"],
            tuple(map(tuple, values["predicted"])),
        )
        assert again == report and str(again) == str(report)


def test_reports_are_frozen(reports: tuple[CompressionReport, CompressionReport]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        reports[0].seconds = 3.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        reports[0].tables[0].rows = 3  # type: ignore[misc]


# --- what is said of tables ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("left_out", "include and exclude"), ("tiny", "min_rows=128"), ("normed", "max_norm")],
)
def test_skipped_tables_have_a_reason(
    reports: tuple[CompressionReport, CompressionReport], name: str, words: str
) -> None:
    for report in reports:
        (table,) = (t for t in report.tables if t.name == name)
        assert not table.compressed and words in table.reason
        assert table.layout == "as it was" and table.row_bits == 0
        assert table.bytes_after == table.other_bytes == table.bytes_before > 0
        assert table.weighted_error is None and table.dtype == "float32"
        (line,) = (x for x in str(report).splitlines() if x.startswith(f"as it was: {name} "))
        assert words in line and f"{table.rows} x {table.dim}" in line


def test_the_plan_is_what_compress_does(
    reports: tuple[CompressionReport, CompressionReport],
) -> None:
    planned, done = reports
    learned = ("weighted_error", "start_error", "learned_error", "perplexity", "dead_codes")
    learned += ("objective", "seconds")
    for before, after in zip(planned.tables, done.tables, strict=True):
        blank = {f.name: f.default for f in dataclasses.fields(TableReport) if f.name in learned}
        blank["objective"] = {}
        assert dataclasses.replace(after, **blank) == before
    assert planned.seconds is None and "(planned)" in str(planned)
    assert done.seconds > 0 and "(planned)" not in str(done)
    assert planned.notes == done.notes and planned.config == done.config == OPTIONS
    assert planned.predicted == done.predicted != ()
    assert planned.predicted_error == done.predicted_error > 0


@pytest.mark.parametrize("ratio", [5, 20, 60])
def test_other_sizes_are_those_of_other_plans(ratio: int) -> None:
    """What a plan says of another ratio, the planner finds or betters there."""
    one = plan(_model(), COUNTS, CompressionConfig(ratio=20))
    other = plan(_model(), COUNTS, CompressionConfig(ratio=ratio))
    sizes, errors = zip(*one.predicted, strict=True)
    assert list(sizes) == sorted(sizes) and list(errors) == sorted(errors, reverse=True)
    assert sizes[-1] == one.bytes_before and errors[-1] == 0
    there = np.interp(other.bytes_after, sizes, errors)
    assert 0.5 * there < other.predicted_error < 1.05 * there


def test_the_predicted_error_is_near_the_one_found() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3000, 8) @ torch.randn(8, 16)
    model = nn.ModuleDict({"large": nn.Embedding.from_pretrained(rows)})
    report = compress(
        model, {"large": COUNTS["large"]}, CompressionConfig(ratio=20), progress=False
    )
    assert 0.5 < report.predicted_error / report.tables[0].weighted_error < 2


def test_what_was_learned_is_reported(
    reports: tuple[CompressionReport, CompressionReport],
) -> None:
    learned = [t for t in reports[1].tables if t.compressed]
    assert {"large", "bag"} <= {t.name for t in learned}
    for table in learned:
        assert 0 < table.weighted_error < 1
        assert 0 < table.learned_error <= table.start_error
        assert 1 <= table.perplexity <= table.codewords
        assert 0 <= table.dead_codes < table.codewords
        assert table.objective.keys() == {"reconstruction", "usage", "contrastive"}
    assert sum(t.seconds or 0 for t in learned) <= reports[1].seconds


def test_weighted_error_is_that_of_the_rows() -> None:
    model = _model()
    dense = model["large"].weight.detach().double().numpy()
    report = compress(model, COUNTS, OPTIONS, progress=False)
    (table,) = (t for t in report.tables if t.name == "large")
    share = np.sqrt(COUNTS["large"]) / np.sqrt(COUNTS["large"]).sum()
    decoded = model["large"].weight.detach().double().numpy()
    error = share @ np.square(dense - decoded).sum(1)
    variance = share @ np.square(dense - share @ dense).sum(1)
    assert table.weighted_error == pytest.approx(error / variance, rel=1e-4)
    assert table.popularity == "sqrt" and table.lookups == COUNTS["large"].sum()


def test_notes_tell_of_missing_counts(
    reports: tuple[CompressionReport, CompressionReport],
) -> None:
    (note,) = reports[0].notes
    assert "no counts for bag" in note and f"note: {note}" in str(reports[0])
    (bag,) = (t for t in reports[0].tables if t.name == "bag")
    assert bag.popularity == "uniform" and bag.lookups is None
    (uniform,) = plan(_model(), None, OPTIONS).notes
    assert "no freq_stats" in uniform
    every = {name: np.ones(m.num_embeddings) for name, m in _model().items()}
    assert plan(_model(), every, OPTIONS).notes == ()


def test_tables_of_several_names_list_them() -> None:
    model = nn.ModuleDict({"a": nn.Embedding(2000, 8), "b": nn.Embedding(2000, 8)})
    model["again"] = model["a"]
    report = plan(model, None, CompressionConfig(ratio=5))
    assert [(t.name, t.aliases) for t in report.tables] == [("a", ("again",)), ("b", ())]
    owners = [t.shares_codebooks_with for t in report.tables]
    assert owners in ([None, "a"], [None, None])
    shared = [t for t in report.tables if t.shares_codebooks_with]
    assert all(t.codebook_bytes == 0 < t.code_bytes for t in shared)


def test_tables_that_share_codes_count_them_once() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"large": nn.Embedding(3000, 8), "first": nn.Embedding(3000, 1)})
    rows = {t.name: t for t in plan(model, COUNTS, CompressionConfig(ratio=12)).tables}
    assert rows["first"].shares_codes_with == "large"
    assert rows["first"].code_bytes == 0 < rows["first"].codebook_bytes
    assert rows["first"].row_bits == rows["large"].row_bits
    assert rows["large"].shares_codes_with is None


def test_lines_do_not_run_into_each_other() -> None:
    report = _report(*(_table(name=f"n{i}", rows=10**i, reason=None) for i in range(1, 9)))
    cells = [line.split() for line in str(report).splitlines()[1:9]]
    assert all(len(line) == 14 for line in cells)
    assert all(len(a[1]) < len(b[1]) for a, b in itertools.pairwise(cells))
