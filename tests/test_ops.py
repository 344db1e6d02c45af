"""The lookup operator against a dense table built code by code."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from mec_embed.layout import CodeLayout
from mec_embed.modules import quantize_codebooks
from mec_embed.ops import bag, lookup
from mec_embed.packing import pack

#: kind, rows, dim, M, K
SHAPES = {
    "additive": ("additive", 23, 6, 3, 5),
    "product": ("product", 23, 6, 3, 5),
    "rows": ("rows", 23, 6, 1, 23),
    "one codebook": ("additive", 23, 6, 1, 2),
    "one column": ("additive", 23, 1, 2, 9),
    "16 bits": ("product", 23, 4, 2, 40_000),
}
KINDS = ["additive", "product", "rows"]
PADDING = 4


class Case:
    """A compressed table as tensors, and its dense form by indexing."""

    def __init__(
        self, shape, dtype=torch.float64, codebook_dtype=None, padding=False, sparse=False
    ):
        self.layout = CodeLayout(*SHAPES[shape], codebook_dtype or dtype)
        self.dtype, self.sparse = dtype, sparse
        self.padding_idx = PADDING if padding else -1
        generator = torch.Generator().manual_seed(1)
        layout = self.layout
        books = torch.randn(
            (layout.num_subvectors, layout.codebook_size, layout.subvector_dim),
            generator=generator,
            dtype=torch.float64,
        )
        self.scales = None
        if layout.codebook_dtype is torch.int8:
            self.books, self.scales = quantize_codebooks(books)
        else:
            self.books = books.to(layout.codebook_dtype).requires_grad_()
        self.raw = torch.randint(
            layout.codebook_size,
            (layout.num_embeddings, layout.num_subvectors),
            generator=generator,
        )
        if layout.kind == "rows":
            self.raw = torch.arange(layout.num_embeddings)[:, None]
            self.codes = torch.zeros(0, dtype=torch.uint8)
        else:
            self.codes = pack(self.raw, layout.bits)

    def args(self, ids, books=None, zero_padding=True):
        layout = self.layout
        return (
            ids,
            self.codes,
            self.books if books is None else books,
            self.scales,
            layout.num_embeddings,
            layout.embedding_dim,
            layout.bits,
            self.padding_idx,
            zero_padding,
            self.sparse,
            self.dtype,
            "user",
        )

    def lookup(self, ids, books=None, zero_padding=True):
        return lookup(*self.args(ids, books, zero_padding))

    def dense(self, books=None):
        """The table (rows, dim), in float64, differentiable."""
        books = (self.books if books is None else books).double()
        if self.scales is not None:
            books = books * self.scales.double()[..., None]
        rows = []
        for codes in self.raw.tolist():
            words = [books[m, code] for m, code in enumerate(codes)]
            rows.append(torch.cat(words) if self.layout.kind == "product" else sum(words))
        return torch.stack(rows)

    def reference(self, ids, books=None):
        """What nn.Embedding on the dense table gives; the padding row is zero without gradient."""
        dense = self.dense(books)
        if self.padding_idx >= 0:
            keep = torch.ones(len(dense), 1, dtype=dense.dtype)
            keep[self.padding_idx] = 0
            dense = dense * keep
        return F.embedding(ids.long(), dense)


IDS = torch.tensor([[0, 22, 4], [7, 7, 1]])


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient(shape, ids_dtype, padding):
    case = Case(shape, padding=padding)
    ids = IDS.to(ids_dtype)
    out, expected = case.lookup(ids), case.reference(ids)
    assert out.shape == (2, 3, case.layout.embedding_dim) and out.dtype is torch.float64
    torch.testing.assert_close(out, expected)
    factor = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    (grad,) = torch.autograd.grad((out * factor).sum(), case.books)
    (wanted,) = torch.autograd.grad((expected * factor).sum(), case.books)
    torch.testing.assert_close(grad, wanted)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", KINDS)
def test_narrow_dtypes(shape, dtype):
    """Sums are made in float32 and rounded once."""
    case = Case(shape, dtype=dtype)
    out = case.lookup(IDS)
    assert out.dtype is dtype
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(out.double(), case.reference(IDS), **close)
    out.backward(torch.ones_like(out))
    (wanted,) = torch.autograd.grad(case.reference(IDS).sum(), case.books)
    assert case.books.grad.dtype is dtype
    torch.testing.assert_close(case.books.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_of_many_lookups_is_summed_in_float32(dtype):
    """Ones added one by one would stick at 256 or 2048 in a narrow dtype."""
    case = Case("one codebook", dtype=dtype)
    ids = torch.zeros(10_000, dtype=torch.long)
    case.lookup(ids).float().sum().backward()
    assert case.books.grad.max().item() == pytest.approx(10_000, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mean_of_a_long_bag_shares_its_gradient_by_all_its_ids(dtype):
    """A narrow dtype counts to 256 or 2048, and a gradient shared by fewer would be larger."""
    books = torch.zeros(2, 3, 4, requires_grad=True)
    codes = pack(torch.randint(3, (50, 2)), 2)
    ids = torch.arange(1, 3001).view(1, -1) % 50
    table = (codes, books, None, 50, 4, 2, 0)
    out = bag(ids, None, None, *table, "mean", False, False, dtype, "t")
    out.sum().backward()
    assert books.grad.sum().item() == pytest.approx(8, rel=1e-2)


@pytest.mark.parametrize("out", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("books", [torch.float16, torch.float32, torch.float64])
def test_output_dtype_need_not_be_that_of_the_codebooks(out, books):
    case = Case("additive", dtype=out, codebook_dtype=books)
    rows = case.lookup(IDS)
    rows.sum().backward()
    assert rows.dtype is out and case.books.grad.dtype is books
    torch.testing.assert_close(rows.double(), case.reference(IDS), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", KINDS)
def test_int8_with_scales(shape, padding):
    case = Case(shape, dtype=torch.float32, codebook_dtype=torch.int8, padding=padding)
    out = case.lookup(IDS)
    assert out.dtype is torch.float32 and not out.requires_grad
    torch.testing.assert_close(out.double(), case.reference(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", KINDS)
def test_padding_is_zero_without_gradient(shape, sparse):
    case = Case(shape, padding=True, sparse=sparse)
    out = case.lookup(torch.tensor([PADDING, PADDING]))
    assert out.eq(0).all()
    out.sum().backward()
    assert case.books.grad.to_dense().eq(0).all()


def test_nonzero_padding_keeps_its_row_but_passes_no_gradient():
    case = Case("additive", padding=True)
    out = case.lookup(torch.tensor([PADDING, 1]), zero_padding=False)
    torch.testing.assert_close(out, case.dense()[[PADDING, 1]])
    out.sum().backward()
    (wanted,) = torch.autograd.grad(case.dense()[1].sum(), case.books)
    torch.testing.assert_close(case.books.grad, wanted)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", KINDS)
def test_sparse_gradient_equals_dense(shape, padding):
    dense, sparse = Case(shape, padding=padding), Case(shape, padding=padding, sparse=True)
    for case in (dense, sparse):
        case.lookup(IDS).square().sum().backward()
    assert sparse.books.grad.is_sparse and not dense.books.grad.is_sparse
    assert sparse.books.grad.sparse_dim() == 2
    torch.testing.assert_close(sparse.books.grad.to_dense(), dense.books.grad)


@pytest.mark.parametrize("size", [(), (0,), (1,), (3, 0, 2), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("shape", KINDS)
def test_any_shape_of_ids(shape, size):
    case = Case(shape)
    ids = torch.randint(23, size, generator=torch.Generator().manual_seed(0))
    out = case.lookup(ids)
    assert out.shape == (*size, 6)
    torch.testing.assert_close(out, case.reference(ids))
    out.sum().backward()
    (wanted,) = torch.autograd.grad(case.reference(ids).sum(), case.books)
    torch.testing.assert_close(case.books.grad, wanted)


def test_strided_ids():
    case = Case("additive")
    ids = torch.arange(20).view(4, 5).T[::2]
    assert not ids.is_contiguous()
    torch.testing.assert_close(case.lookup(ids), case.reference(ids))


@pytest.mark.parametrize("wrong", [-1, 23, 10**6])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", KINDS)
def test_id_out_of_range_names_the_table(shape, ids_dtype, wrong):
    with pytest.raises(IndexError, match=f"'user'.*{wrong}"):
        Case(shape).lookup(torch.tensor([0, wrong, 1], dtype=ids_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
def test_ids_of_another_dtype(dtype):
    with pytest.raises(TypeError, match="'user'"):
        Case("additive").lookup(torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", KINDS)
def test_first_and_second_derivative(shape, padding):
    case = Case(shape, padding=padding)
    ids = IDS[0]

    def function(books):
        return case.lookup(ids, books)

    assert gradcheck(function, (case.books,))
    assert gradgradcheck(function, (case.books,))
    assert gradgradcheck(lambda books: function(books).square(), (case.books,))


#: Offsets, mode, whether ids have weights, and whether offsets end with the number of ids.
BAGS = {
    "2-D": (None, "sum", False, False),
    "mean": (None, "mean", False, False),
    "weights": (None, "sum", True, False),
    "offsets": ([0, 0, 4], "sum", False, False),
    "mean of offsets": ([0, 2, 2], "mean", False, False),
    "weights of offsets": ([0, 1, 6], "sum", True, True),
}


def bag_arguments(case, kind):
    """What comes before the codes, and what follows the shape of the table."""
    offsets, mode, weighted, last = BAGS[kind]
    ids = IDS if offsets is None else IDS.reshape(-1)
    starts = None if offsets is None else torch.tensor(offsets)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64).view(ids.shape)
    return (ids, starts, weights.requires_grad_() if weighted else None), (mode, last)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("kind", BAGS)
def test_first_and_second_derivative_of_bags(shape, padding, kind):
    case = Case(shape, padding=padding)
    (ids, offsets, weights), (mode, last) = bag_arguments(case, kind)
    layout = case.layout
    table = (layout.num_embeddings, layout.embedding_dim, layout.bits, case.padding_idx)

    def function(books, weights):
        options = (*table, mode, last, False, torch.float64, "t")
        return bag(ids, offsets, weights, case.codes, books, None, *options)

    def square(books, weights):
        return function(books, weights).square()

    for made in (function, square):
        assert gradcheck(made, (case.books, weights))
        assert gradgradcheck(made, (case.books, weights))


def test_nodes_of_the_graph_are_named_by_their_operator():
    """Profiles and errors of autograd have this name only."""
    case = Case("additive")
    (grad,) = torch.autograd.grad(case.lookup(IDS).square().sum(), case.books, create_graph=True)
    assert case.lookup(IDS).grad_fn.name() == "mec_embed_lookupBackward"
    assert grad.grad_fn.name() == "mec_embed_lookup_backwardBackward"


@pytest.mark.parametrize("shape", KINDS)
def test_gradient_penalty(shape):
    """A second derivative as used in practice, against the reference."""
    case = Case(shape, padding=True)
    found = []
    for function in (case.lookup, case.reference):
        (first,) = torch.autograd.grad(function(IDS).pow(3).sum(), case.books, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), case.books)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0


OPCHECKS = [
    pytest.param(shape, options, id=f"{shape}-{'-'.join(map(str, options.values())) or 'plain'}")
    for shape in KINDS
    for options in (
        {},
        {"dtype": torch.float32, "codebook_dtype": torch.int8},
        {"padding": True},
        {"dtype": torch.float16},
    )
]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("shape", "options"), OPCHECKS)
def test_opcheck_lookup(shape, options, ids_dtype):
    case = Case(shape, **options)
    torch.library.opcheck(torch.ops.mec_embed.lookup.default, case.args(IDS.to(ids_dtype)))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("shape", KINDS)
def test_opcheck_lookup_backward(shape, padding):
    case = Case(shape, padding=padding)
    layout = case.layout
    grad = torch.randn(2, 3, layout.embedding_dim, dtype=torch.float64, requires_grad=True)
    args = (
        grad,
        IDS,
        case.codes,
        layout.num_embeddings,
        layout.embedding_dim,
        layout.bits,
        case.padding_idx,
        *case.books.shape,
        torch.float64,
    )
    torch.library.opcheck(torch.ops.mec_embed.lookup_backward.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("kind", BAGS)
def test_opcheck_bag_backward(shape, kind, dtype):
    case = Case(shape, padding=True)
    (ids, offsets, weights), options = bag_arguments(case, kind)
    weights = None if weights is None else weights.detach().to(dtype).requires_grad_()
    layout = case.layout
    bags = 2 if offsets is None else len(offsets) - options[1]
    grad = torch.randn(bags, layout.embedding_dim, dtype=dtype, requires_grad=True)
    table = (layout.num_embeddings, layout.embedding_dim, layout.bits, case.padding_idx)
    args = (grad, ids, offsets, weights, case.codes, *table, *options, *case.books.shape, dtype)
    torch.library.opcheck(torch.ops.mec_embed.bag_backward.default, args)
