"""The planner: predicted errors, exact bytes, allocation, pairing and sharing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mec_embed import CompressionConfig, compress, plan
from mec_embed import budget as planner
from mec_embed.budget import (
    Choice,
    Field,
    Group,
    allocate,
    assign,
    choices,
    code_shapes,
    cut_counts,
    explicit_choice,
    grouped,
    make_fields,
    popular_rows,
    predicted_error,
    sharings,
    split_fields,
)
from mec_embed.tables import Alias, Table


def _table(
    name: str, rows: int, dim: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Table:
    generator = torch.Generator().manual_seed(rows * 1000 + dim)
    module = nn.Embedding(1, 1)
    weight = torch.randn(rows, dim, generator=generator) * scale
    module = nn.Embedding(rows, dim, _weight=weight.to(dtype))
    return Table(module, (Alias(nn.Module(), name, name),))


def _field(rows: int, dim: int, pair: bool = False, lookups: float = 1.0, **options) -> Field:
    partner = _table("first", rows, 1) if pair else None
    weights = torch.full((rows,), lookups / rows)
    return Field(_table("table", rows, dim, **options), partner, weights)


# --- predicted error ----------------------------------------------------------------------------


def _water_filling(spectrum: np.ndarray, bits: float) -> float:
    """Reverse water-filling by bisection on the water level."""
    low, high = 1e-300, float(spectrum.max())
    for _ in range(3000):
        level = np.sqrt(low) * np.sqrt(high)
        above = spectrum[spectrum > level]
        if 0.5 * np.log2(above / level).sum() > bits:
            low = level
        else:
            high = level
    return float(np.minimum(spectrum, high).sum())


spectra = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20).map(
    lambda values: np.array(sorted(values, reverse=True))
)


@settings(max_examples=80, deadline=None)
@given(spectra, st.floats(0.1, 200))
def test_predicted_error_is_reverse_water_filling(spectrum: np.ndarray, bits: float) -> None:
    kept = spectrum[spectrum > 1e-12 * spectrum[0]]
    found = predicted_error(spectrum, np.array([bits]))[0]
    assert found == pytest.approx(_water_filling(kept, bits), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(spectra)
def test_predicted_error_falls_with_bits_from_the_variance(spectrum: np.ndarray) -> None:
    errors = predicted_error(spectrum, np.array([1e-9, *range(1, 60, 3)]))
    kept = spectrum[spectrum > 1e-12 * spectrum[0]]
    assert errors[0] == pytest.approx(kept.sum())
    assert bool((np.diff(errors) < 0).all()) and errors[-1] > 0


def test_predicted_error_with_columns_that_do_not_vary() -> None:
    assert predicted_error(np.zeros(5), np.array([0, 8, 80])).tolist() == [0, 0, 0]
    plain = predicted_error(np.array([4.0, 1.0]), np.array([3.0, 9.0]))
    padded = predicted_error(np.array([4.0, 1.0, 0.0, 0.0]), np.array([3.0, 9.0]))
    np.testing.assert_allclose(plain, padded)
    # Two equal columns share the bits: each bit halves the amplitude of both by sqrt(2).
    np.testing.assert_allclose(predicted_error(np.ones(2), np.array([4.0])), 2 * 2**-4.0)


def test_spectrum_is_that_of_the_weighted_covariance() -> None:
    field = _field(500, 6, pair=True)
    weights = torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 4
    group = Group((Field(field.table, field.partner, weights),))
    x = torch.cat([field.table.weight, field.partner.weight], 1).detach().double().numpy()
    covariance = np.cov(x.T, aweights=weights.double().numpy(), bias=True)
    expected = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(group.spectrum, expected, rtol=1e-6)


def test_spectrum_of_a_sample_follows_the_weights() -> None:
    """Of many rows, only some are read; the heavy ones decide."""
    rows = planner._SAMPLE * 3
    table = _table("table", rows, 4)
    with torch.no_grad():
        table.weight[rows // 2 :] *= 10
    weights = torch.ones(rows)
    weights[rows // 2 :] = 1e-3
    light = Group((Field(table, None, weights),)).spectrum
    heavy = Group((Field(table, None, weights.flip(0)),)).spectrum
    assert 3 < light.sum() < 6 and 300 < heavy.sum() < 500


def test_spectrum_of_a_group_pools_means_too() -> None:
    low, high = _field(300, 4, lookups=3.0), _field(200, 4, lookups=1.0)
    with torch.no_grad():
        high.table.weight.add_(5)
    group = Group((low, high))
    x = torch.cat([low.table.weight, high.table.weight]).detach().double().numpy()
    weights = torch.cat([low.weights, high.weights]).double().numpy()
    expected = np.linalg.eigvalsh(np.cov(x.T, aweights=weights, bias=True))[::-1]
    np.testing.assert_allclose(group.spectrum, expected, rtol=1e-5)
    assert group.mass == pytest.approx(4.0) and group.rows == 500


# --- bytes --------------------------------------------------------------------------------------


def _assert_sizes(fields: list[Field], codes: str, dtype: str | None) -> None:
    config, group = CompressionConfig(codes=codes, codebook_dtype=dtype), Group(tuple(fields))
    shapes = code_shapes(group, config)
    assert shapes
    sizes = planner._sizes(group, shapes, config)
    assert sizes.tolist() == [group.layout_bytes(shape, config) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    codes=st.sampled_from(["additive", "product"]),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16", "int8"]),
    rows=st.lists(st.integers(3, 5000), min_size=1, max_size=3),
    dim=st.sampled_from([1, 2, 6, 16]),
    pair=st.booleans(),
    of_table=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_sizes_are_those_of_the_layouts(
    codes: str, dtype: str | None, rows: list[int], dim: int, pair: bool, of_table: torch.dtype
) -> None:
    pair = pair and dim > 1 and codes == "additive"
    fields = [
        Field(
            _table("a", n, dim, of_table),
            _table("b", n, 1, of_table) if pair else None,
            torch.ones(n),
        )
        for n in rows
    ]
    _assert_sizes(fields, codes, dtype)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_sizes_of_a_pair_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tables = [_table("v.a", 300, 8, dtypes[0]), _table("w.a", 300, 1, dtypes[1])]
    _assert_sizes(
        make_fields(tables, [torch.ones(300)] * 2, [None] * 2, [None] * 2, True), "additive", None
    )


@pytest.mark.parametrize("codes", ["additive", "product"])
@pytest.mark.parametrize("dtype", [None, "float16", "int8"])
def test_choices_form_a_front_of_possible_layouts(codes: str, dtype: str | None) -> None:
    config = CompressionConfig(codes=codes, codebook_dtype=dtype)
    group = Group((_field(6000, 12, lookups=10.0),))
    front = choices(group, config)
    assert all(
        a.nbytes < b.nbytes and a.distortion > b.distortion for a, b in itertools.pairwise(front)
    )
    assert front[-1] == Choice(None, 6000 * 12 * 4, 0.0)
    for choice in front[:-1]:
        assert choice.nbytes == group.layout_bytes(choice.shape, config) < 6000 * 12 * 4
    assert len(front) > 10


@pytest.mark.parametrize("codes", ["additive", "product"])
def test_codes_of_fewer_codewords_than_rows_are_not_predicted_to_be_exact(codes: str) -> None:
    group = Group((_field(600, 12),))
    *front, last = choices(group, CompressionConfig(codes=codes))
    assert last == Choice(None, 600 * 12 * 4, 0.0), "only the table as it is loses nothing"
    assert all(choice.distortion > 0 for choice in front)


def test_of_shapes_about_as_good_that_with_fewer_codewords_a_row_is_chosen() -> None:
    config = CompressionConfig(ratio=50, codebook_dtype="int8")
    shapes = {choice.shape for choice in choices(Group((_field(10_000, 64),)), config)}
    # 1.7% less error in 2.7% more bytes is not worth adding up 18 codewords instead of 8.
    assert ("additive", 8, 16) in shapes and ("additive", 18, 4) not in shapes
    # What gains more stays.
    assert max(shape[1] for shape in shapes if shape is not None) > 20
    # The codewords of a product code stand side by side.
    few, many = planner._costs([("product", 2, 4), ("product", 32, 4)], np.ones(2))
    assert few == many


@pytest.mark.parametrize("table", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("books", [None, "float32", "float16", "bfloat16", "int8"])
def test_every_pair_of_dtypes_has_choices(table: torch.dtype, books: str | None) -> None:
    config = CompressionConfig(codebook_dtype=books)
    group = Group((_field(300, 8, dtype=table),))
    front = choices(group, config)
    rows = [choice for choice in front if choice.shape and choice.shape[0] == "rows"]
    narrower = config.codebook_dtype_for(table).itemsize < table.itemsize
    assert len(rows) == (1 if narrower else 0)


def test_explicit_choice() -> None:
    config = CompressionConfig(num_subvectors=3, codebook_size=16, codes="product")
    group = Group((_field(2000, 12),))
    choice = explicit_choice(group, config)
    assert choice.shape == ("product", 3, 16)
    assert choice.nbytes == group.layout_bytes(choice.shape, config)
    assert explicit_choice(Group((_field(2000, 1),)), config).shape == ("additive", 1, 16)
    assert explicit_choice(Group((_field(4, 12),)), config) == Choice(None, 4 * 12 * 4, 0.0)
    with pytest.raises(ValueError, match=r"'table'.*num_subvectors=3.*embedding_dim=8"):
        explicit_choice(Group((_field(2000, 8),)), config)


# --- allocation ---------------------------------------------------------------------------------


def _random_fronts(seed: int) -> list[list[Choice]]:
    draw = random.Random(seed)
    fronts = []
    for _ in range(draw.randint(1, 4)):
        count = draw.randint(1, 6)
        sizes = sorted(draw.sample(range(1, 200), count))
        errors = sorted((draw.uniform(0, 100) ** draw.choice([1, 2]) for _ in sizes), reverse=True)
        fronts.append([Choice(None, n, e) for n, e in zip(sizes, errors, strict=True)])
    return fronts


def _rate_fronts(seed: int, steps: int = 8) -> list[list[Choice]]:
    """Fronts as tables have them: the distortion falls geometrically with the bytes."""
    draw = random.Random(seed)
    fronts = []
    for _ in range(draw.randint(2, 4)):
        rows, mass, dim = draw.randint(20, 300), 10 ** draw.uniform(0, 3), draw.randint(1, 8)
        sizes = [rows * bits // 8 + 8 + 4 * bits for bits in range(1, steps + 1)]
        fronts.append(
            [Choice(None, n, mass * 2 ** (-2 * (b + 1) / dim)) for b, n in enumerate(sizes)]
        )
    return fronts


def _total(chosen: tuple[Choice, ...] | list[Choice]) -> tuple[int, float]:
    return sum(c.nbytes for c in chosen), sum(c.distortion for c in chosen)


def _best(fronts: list[list[Choice]], budget: int) -> float | None:
    found = [_total(chosen) for chosen in itertools.product(*fronts)]
    return min((error for size, error in found if size <= budget), default=None)


@pytest.mark.parametrize("seed", range(40))
def test_allocate_keeps_to_the_budget_and_is_near_the_optimum(seed: int) -> None:
    fronts = _random_fronts(seed)
    least, most = sum(f[0].nbytes for f in fronts), sum(f[-1].nbytes for f in fronts)
    # The worst that a Lagrangian can miss is the best single upgrade that would not fit.
    step = max(
        a.distortion - b.distortion for f in fronts for a, b in itertools.pairwise([*f, f[-1]])
    )
    for budget in (least, least + 1, (least + most) // 2, most - 1, most, 10 * most):
        chosen = allocate(fronts, budget)
        best = _best(fronts, budget)
        if budget < least:
            assert chosen is None
            continue
        assert chosen is not None and best is not None
        assert all(choice in front for choice, front in zip(chosen, fronts, strict=True))
        size, error = _total(chosen)
        assert size <= budget
        assert best - 1e-9 <= error <= best + step + 1e-9
        if budget in (least, 10 * most):
            assert error == pytest.approx(best)


def test_allocate_is_within_a_few_percent_of_the_optimum_on_rate_curves() -> None:
    excess = []
    for seed in range(60):
        fronts = _rate_fronts(seed)
        least, most = sum(f[0].nbytes for f in fronts), sum(f[-1].nbytes for f in fronts)
        budget = least + (most - least) * (1 + seed % 4) // 6
        chosen = allocate(fronts, budget)
        size, error = _total(chosen)
        assert size <= budget
        excess.append(error / _best(fronts, budget) - 1)
    assert min(excess) > -1e-9
    assert np.mean(excess) < 0.03 and max(excess) < 0.25


@pytest.mark.parametrize("seed", range(10))
def test_more_budget_is_never_worse_than_the_hull_below(seed: int) -> None:
    fronts = _rate_fronts(seed)
    least, most = sum(f[0].nbytes for f in fronts), sum(f[-1].nbytes for f in fronts)
    errors = [_total(allocate(fronts, b))[1] for b in np.linspace(least, most, 6).astype(int)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_allocate_is_none_where_the_smallest_do_not_fit() -> None:
    fronts = [[Choice(None, 10, 5.0), Choice(None, 20, 0.0)], [Choice(None, 7, 1.0)]]
    assert allocate(fronts, 16) is None
    assert _total(allocate(fronts, 17)) == (17, 6.0)
    assert _total(allocate(fronts, 26)) == (17, 6.0)
    assert _total(allocate(fronts, 27)) == (27, 1.0)


def test_assign_names_the_least_bytes_and_they_are_enough() -> None:
    tables = [_table("a", 3000, 8), _table("b", 500, 8), _table("c", 3000, 1)]
    weights = [torch.ones(table.rows) for table in tables]
    keys: dict[Table, Hashable] = {table: table.dim for table in tables}
    arguments = (tables, weights, [None] * 3, [None] * 3, keys, CompressionConfig(ratio=50))
    with pytest.raises(ValueError, match="cannot fit in 10 bytes; the least possible is") as error:
        assign(*arguments, 10)
    least = int(
        str(error.value).partition("possible is ")[2].partition(" bytes")[0].replace(",", "")
    )
    assert 0 < _total(assign(*arguments, least).chosen)[0] <= least
    with pytest.raises(ValueError, match=f"{least:,}"):
        assign(*arguments, least - 1)


@pytest.mark.parametrize("codes", ["additive", "product"])
@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("ratio", [2, 5, 12.5])
def test_a_plan_keeps_to_the_budget_and_uses_it(
    codes: str, dtype: str | None, ratio: float
) -> None:
    model = nn.ModuleDict({f"f{i}": nn.Embedding(n, 16) for i, n in enumerate((4000, 900, 300))})
    report = plan(model, None, CompressionConfig(ratio=ratio, codes=codes, codebook_dtype=dtype))
    # Product codes come in fewer shapes: none lies between the largest and the table itself.
    slack = 1.4 if codes == "product" else 1.1
    assert ratio <= report.ratio < slack * ratio


# --- pairing ------------------------------------------------------------------------------------


def _pairs(
    tables: list[Table], times: list[int | None] | None = None, pair: bool = True
) -> set[tuple[str, str]]:
    """Names of the pairs; ``times`` says how often each row of each table occurs."""
    weights = [torch.full((table.rows,), float(i + 1)) for i, table in enumerate(tables)]
    counts = [
        None if often is None else np.full(table.rows, often)
        for table, often in zip(tables, times or [None] * len(tables), strict=True)
    ]
    fields = make_fields(tables, weights, counts, [None] * len(tables), pair)
    held = [table for field in fields for table in field.tables]
    assert sorted(t.name for t in held) == sorted(t.name for t in tables)
    for field in fields:
        assert field.weights is weights[tables.index(field.table)]
        assert field.dim == sum(table.dim for table in field.tables)
    return {(f.table.name, f.partner.name) for f in fields if f.partner is not None}


def test_first_order_tables_join_by_rows() -> None:
    tables = [_table("v.a", 30, 4), _table("v.b", 40, 4), _table("w.x", 40, 1)]
    assert _pairs(tables) == {("v.b", "w.x")}
    assert _pairs(tables[::-1]) == {("v.b", "w.x")}
    assert _pairs(tables, pair=False) == set()
    assert _pairs([*tables, _table("w.y", 41, 1)]) == {("v.b", "w.x")}


def test_of_several_the_name_decides() -> None:
    vectors = [_table("v.a", 30, 4), _table("v.b", 30, 8)]
    assert _pairs([*vectors, _table("w.a", 30, 1), _table("w.b", 30, 1)]) == {
        ("v.a", "w.a"),
        ("v.b", "w.b"),
    }
    assert _pairs([*vectors, _table("w.c", 30, 1)]) == set()
    assert _pairs([_table("v.a", 30, 4), _table("u.a", 30, 8), _table("w.a", 30, 1)]) == set()


@pytest.mark.parametrize(
    ("vector", "first", "joins"),
    [(None, None, True), (1, 1, True), (1, None, True), (1, 2, False), (None, 1, False)],
)
def test_popularity_must_agree(vector: int | None, first: int | None, joins: bool) -> None:
    tables = [_table("v.a", 30, 4), _table("w.a", 30, 1)]
    assert bool(_pairs(tables, [vector, first])) is joins


def test_popularity_tells_tables_of_equal_rows_apart() -> None:
    tables = [_table("v.a", 30, 4), _table("v.b", 30, 4), _table("w.x", 30, 1)]
    assert _pairs(tables, [1, 2, 2]) == {("v.b", "w.x")}


def test_popularity_of_equal_sum_is_told_apart_by_rows() -> None:
    tables = [_table("v.a", 30, 4), _table("w.a", 30, 1)]
    rising = np.arange(30)
    for counts, joins in (([rising, rising], True), ([rising, rising[::-1]], False)):
        fields = make_fields(tables, [torch.ones(30)] * 2, counts, [None] * 2, True)
        assert (len(fields) == 1) is joins


def test_a_vector_table_takes_one_partner() -> None:
    tables = [_table("v.a", 30, 4), _table("w.a", 30, 1), _table("u.a", 30, 1)]
    assert _pairs(tables) == {("v.a", "w.a")}


def test_vectors_do_not_join_vectors() -> None:
    assert _pairs([_table("v.a", 30, 4), _table("w.a", 30, 4)]) == set()
    assert _pairs([_table("v.a", 30, 1), _table("w.a", 30, 1)]) == set()


def test_a_field_reads_both_tables_of_some_rows() -> None:
    field = _field(30, 4, pair=True, dtype=torch.float16)
    ids = torch.tensor([3, 29, 3])
    x = field.read(ids, torch.device("cpu"))
    expected = torch.cat([field.table.weight[ids].float(), field.partner.weight[ids]], 1)
    assert x.dtype is torch.float32 and torch.equal(x, expected) and not x.requires_grad


# --- sharing ------------------------------------------------------------------------------------


def _ways(fields: list[Field], keys: list[str]) -> list[list[Group]]:
    found = [grouped(fields, keys, sharing) for sharing in sharings(fields)]
    return [groups for groups in found if groups is not None]


def test_only_equal_keys_share() -> None:
    fields = [_field(rows, 4) for rows in (100, 300, 2000, 5000, 30_000)]
    keys = ["x", "x", "y", "x", "y"]
    ways = _ways(fields, keys)
    assert all(len(group.fields) == 1 for group in ways[0]) and len(ways[0]) == 5
    assert len(ways) > 2
    for groups in ways:
        held = [field for group in groups for field in group.fields]
        assert sorted(map(id, held)) == sorted(map(id, fields))
        for group in groups:
            assert len({keys[fields.index(field)] for field in group.fields}) == 1
    shared = {
        tuple(f.table.rows for f in group.fields)
        for groups in ways
        for group in groups
        if len(group.fields) > 1
    }
    assert (100, 300, 5000) in shared and (2000, 30_000) in shared
    assert (300, 5000) in shared, "very small tables may stay alone"


@pytest.mark.parametrize("keys", [["x"], ["x", "y", "z"]])
def test_nothing_to_share_is_one_way(keys: list[str]) -> None:
    fields = [_field(rows, 4) for rows in (100, 300, 2000)[: len(keys)]]
    (groups,) = _ways(fields, keys)
    assert [group.fields for group in groups] == [(field,) for field in fields]


def test_many_small_tables_share_codebooks_and_other_dims_do_not() -> None:
    torch.manual_seed(0)
    tables = {f"a{i}": nn.Embedding(400, 8) for i in range(6)}
    model = nn.ModuleDict({**tables, "b": nn.Embedding(400, 12), "c": nn.Embedding(400, 8).half()})
    report = plan(model, None, CompressionConfig(ratio=12))
    rows = {table.name: table for table in report.tables}
    owners = [rows[f"a{i}"].shares_codebooks_with for i in range(6)]
    assert owners[0] is None and set(owners[1:]) == {"a0"}
    assert rows["b"].shares_codebooks_with is None and rows["c"].shares_codebooks_with is None


# --- tiers --------------------------------------------------------------------------------------


def _counted(counts: np.ndarray, pair: bool = False) -> Field:
    tables = [_table("table", len(counts), 8), _table("first", len(counts), 1)]
    weights = torch.from_numpy(counts).float() + 0.1
    return Field(tables[0], tables[1] if pair else None, weights, counts=counts)


@pytest.mark.parametrize("pair", [False, True])
def test_a_split_keeps_every_row_once_with_its_weight(pair: bool) -> None:
    counts = np.random.default_rng(0).integers(0, 10, 1000)
    whole = _counted(counts, pair)
    head, tail = split_fields([whole], 4)
    assert (head.tier, tail.tier) == ("head", "tail")
    assert torch.equal(popular_rows(head), torch.from_numpy(counts >= 4))
    assert torch.equal(popular_rows(tail), torch.from_numpy(counts < 4))
    assert head.nbytes + tail.nbytes == whole.nbytes
    for tier in (head, tail):
        assert tier.tables == whole.tables and tier.rows == len(tier.ids)
        assert torch.equal(tier.weights, whole.weights[tier.ids])
        own = torch.tensor([0, tier.rows - 1])
        device = torch.device("cpu")
        assert torch.equal(tier.read(own, device), whole.read(tier.ids[own], device))


@pytest.mark.parametrize("popular", [0, 1, 63, 64, 500, 936, 937, 1000])
def test_a_tier_of_few_rows_is_not_made(popular: int) -> None:
    counts = np.where(np.arange(1000) < popular, 8, 0)
    fields = split_fields([_counted(counts)], 4)
    assert [field.tier for field in fields] == (
        ["head", "tail"] if 64 <= popular <= 936 else [None]
    )


def test_fields_without_counts_stay_whole() -> None:
    field = _field(1000, 4)
    assert split_fields([field], 1) == [field] and cut_counts([field]) == []


@pytest.mark.parametrize(
    ("most", "cuts"), [(0, []), (1, [1]), (5, [1, 4]), (10**6, [1, 4, 16, 64, 256])]
)
def test_cuts_are_those_that_some_row_reaches(most: int, cuts: list[int]) -> None:
    assert cut_counts([_field(9, 4), _counted(np.array([0, most]))]) == cuts


def test_the_mean_of_a_tier_is_that_of_its_rows() -> None:
    whole = _counted(np.random.default_rng(0).integers(0, 10, 1000), pair=True)
    for tier in split_fields([whole], 4):
        x = torch.cat([table.weight for table in whole.tables], 1).detach()[tier.ids].double()
        weights = tier.weights.double()
        expected = (weights @ x) / weights.sum()
        vector, first = tier.mean
        torch.testing.assert_close(torch.cat([vector, first]), expected)


def test_only_the_tail_may_be_one_row_and_neither_stays_as_it_was() -> None:
    head, tail = split_fields([_counted(np.arange(1000) % 10)], 4)
    config = CompressionConfig()
    shapes = [{c.shape for c in choices(Group((tier,)), config)} for tier in (head, tail)]
    assert ("shared", 1, 1) in shapes[1] and ("shared", 1, 1) not in shapes[0]
    assert not any(None in found for found in shapes)
    one_row = next(c for c in choices(Group((tail,)), config) if c.shape == ("shared", 1, 1))
    assert one_row.nbytes == 8 * 4
    assert one_row.distortion == pytest.approx(Group((tail,)).spectrum.sum() * tail.mass)


def _zipf_plan(budget: int, tiers: bool) -> planner.Assignment:
    table = _table("table", 20_000, 16)
    counts = np.random.default_rng(0).permutation(50_000 // np.arange(1, 20_001))
    weights = torch.from_numpy(counts).float() + 0.1
    config = CompressionConfig(ratio=20, tiers=tiers)
    return assign([table], [weights], [counts], [None], {table: 0}, config, budget)


@pytest.mark.parametrize("ratio", [10, 30, 80])
def test_tiers_are_taken_where_they_lose_less_within_the_budget(ratio: int) -> None:
    budget = 20_000 * 16 * 4 // ratio
    whole, tiered = _zipf_plan(budget, False), _zipf_plan(budget, True)
    assert len(whole.groups) == 1 and len(tiered.groups) == 2
    assert tiered.distortion < whole.distortion
    head = next(g.first for g in tiered.groups if g.first.tier == "head")
    taken = planner.TierMap.nbytes_of(popular_rows(head))
    assert 0 < taken and sum(c.nbytes for c in tiered.chosen) + taken <= budget


# --- what the planner prefers -------------------------------------------------------------------


def test_a_table_of_more_lookups_gets_more_bits() -> None:
    tables = [_table("often", 4000, 16), _table("seldom", 4000, 16)]
    weights = [torch.full((4000,), 100.0), torch.full((4000,), 0.1)]
    keys: dict[Table, Hashable] = {table: table.name for table in tables}
    config = CompressionConfig(ratio=12)
    budget = 2 * 4000 * 16 * 4 // 12
    found = assign(tables, weights, [None, None], [None, None], keys, config, budget)
    bits = {
        group.first.table.name: choice.shape[1] * np.log2(choice.shape[2])
        for group, choice in zip(found.groups, found.chosen, strict=True)
    }
    assert bits["often"] >= bits["seldom"] + 10
    turned = assign(tables, weights[::-1], [None, None], [None, None], keys, config, budget)
    swapped = [choice.shape for choice in turned.chosen]
    assert swapped == [choice.shape for choice in found.chosen][::-1]


def test_a_table_of_more_variance_gets_more_bits() -> None:
    tables = [_table("loud", 4000, 16, scale=10.0), _table("quiet", 4000, 16, scale=0.1)]
    weights = [torch.ones(4000)] * 2
    keys: dict[Table, Hashable] = {table: table.name for table in tables}
    config = CompressionConfig(ratio=12)
    found = assign(tables, weights, [None] * 2, [None] * 2, keys, config, 42_000)
    sizes = {g.first.table.name: c.nbytes for g, c in zip(found.groups, found.chosen, strict=True)}
    assert sizes["loud"] > 1.5 * sizes["quiet"]


def test_a_small_table_of_many_lookups_stays_as_rows() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"small": nn.Embedding(150, 8), "large": nn.Embedding(20_000, 8)})
    counts = {"small": np.full(150, 1000), "large": np.full(20_000, 7)}
    plain = {t.name: t for t in plan(model, counts, CompressionConfig(ratio=8)).tables}
    assert plain["small"].layout == "as it was" and "fits the budget" in plain["small"].reason
    assert plain["large"].compressed
    narrow = plan(model, counts, CompressionConfig(ratio=12, codebook_dtype="int8"))
    assert {t.name: t.layout for t in narrow.tables}["small"] == "rows int8"


def test_rows_and_codes_of_one_model_decode_within_their_error() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"small": nn.Embedding(150, 8), "large": nn.Embedding(5000, 8)})
    dense = model["small"].weight.detach().clone()
    counts = {"small": np.full(150, 1000), "large": np.full(5000, 7)}
    config = CompressionConfig(ratio=10, codebook_dtype="int8", epochs=0)
    report = compress(model, counts, config, progress=False)
    rows = {t.name: t for t in report.tables}
    assert rows["small"].weighted_error < 1e-3
    assert 0.01 < rows["large"].weighted_error < 0.9
    torch.testing.assert_close(model["small"].weight, dense, rtol=0, atol=0.5)
