"""The compressed modules beside nn.Embedding and nn.EmbeddingBag with the decoded table."""

import copy
import threading

import processes
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

from mec_embed import CodeLayout, CompressedEmbedding, CompressedEmbeddingBag
from mec_embed.modules import SCALE_RANGE, CodebookSet, quantize_codebooks
from mec_embed.packing import pack
from mec_embed.tiers import TieredEmbedding, TierMap

ROWS, DIM = 50, 6
LAYOUTS = {
    "additive": ("additive", ROWS, DIM, 3, 8),
    "product": ("product", ROWS, DIM, 2, 5),
    "rows": ("rows", ROWS, DIM, 1, ROWS),
}
KINDS = list(LAYOUTS)
IDS = torch.tensor([[3, 49, 0, 3], [7, 7, 7, 21]])


def filled(cls, kind="additive", codebook_dtype=torch.float32, seed=0, **options):
    """A compressed module with random codes and codebooks."""
    layout = CodeLayout(*LAYOUTS[kind], codebook_dtype)
    module = cls(layout, **{"dtype": torch.float32, **options})
    generator = torch.Generator().manual_seed(seed)
    if "codebook_set" not in options:
        module.codebook_set.store(torch.randn(module.codebooks.shape, generator=generator))
    if layout.bits and "code_table" not in options:
        shape = (ROWS, layout.num_subvectors)
        codes = torch.randint(layout.codebook_size, shape, generator=generator)
        module.codes.copy_(pack(codes, layout.bits))
    return module


def dense_like(module, cls=nn.Embedding, **options):
    """The torch module with the decoded table."""
    options = {"padding_idx": module.padding_idx, "sparse": module.sparse, **options}
    dense = cls(ROWS, DIM, _weight=module.dequantize(), **options)
    return dense.to(module.output_dtype.dtype)


def check_gradient(module, dense, run):
    """Codebook gradients are those that reach them through the rows of a dense table."""
    dense.weight.grad = module.codebooks.grad = None
    run(dense).square().sum().backward()
    run(module).square().sum().backward()
    (wanted,) = torch.autograd.grad(
        module.weight, module.codebooks, grad_outputs=dense.weight.grad.to_dense()
    )
    wanted = wanted.to_dense()
    assert wanted.abs().max() > 0
    torch.testing.assert_close(module.codebooks.grad.to_dense(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [CompressedEmbedding, CompressedEmbeddingBag])
def test_a_padding_row_may_be_counted_from_the_end(kind):
    module = filled(kind, padding_idx=-1)
    assert module.padding_idx == nn.Embedding(ROWS, DIM, padding_idx=-1).padding_idx == ROWS - 1
    assert not module.weight[-1].any() and module.weight[0].any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"padding_idx": ROWS}, f"'t': padding_idx must be in {-ROWS}..{ROWS - 1} or None, got"),
        ({"padding_idx": -ROWS - 1}, "'t': padding_idx must be in"),
        ({"mode": "prod"}, "'t': mode must be 'sum', 'mean' or 'max', got 'prod'"),
        ({"dtype": torch.int32}, "'t': dtype must be floating, got torch.int32"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        filled(CompressedEmbeddingBag, name="t", **options)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_embedding(kind, padding_idx, sparse):
    module = filled(CompressedEmbedding, kind, padding_idx=padding_idx, sparse=sparse)
    dense = dense_like(module)
    for ids in (IDS, IDS.int(), IDS[0, 0], IDS[:, :0], IDS[0]):
        out = module(ids)
        assert out.dtype is torch.float32 and out.shape == (*ids.shape, DIM)
        torch.testing.assert_close(out, dense(ids), rtol=0, atol=0)
    check_gradient(module, dense, lambda m: m(IDS))
    assert (module.num_embeddings, module.embedding_dim) == (ROWS, DIM)


def test_embedding_takes_input_by_name():
    """As the argument of nn.Embedding is called."""
    module = filled(CompressedEmbedding)
    assert torch.equal(module(input=IDS), module(IDS))


BAG_CALLS = {
    "2-D": lambda m, w=None: m(IDS, per_sample_weights=w),
    "1-D": lambda m, w=None: m(IDS.flatten(), torch.tensor([0, 3, 3, 8]), flat(w)),
    "1-D int32": lambda m, w=None: m(IDS.flatten().int(), torch.tensor([0, 1]).int(), flat(w)),
    "keywords": lambda m, w=None: m(
        input=IDS.flatten(), offsets=torch.tensor([0, 3]), per_sample_weights=flat(w)
    ),
    "last offset": lambda m, w=None: m(IDS.flatten(), torch.tensor([0, 0, 3, 8]), flat(w)),
}


def flat(weights):
    return None if weights is None else weights.flatten()


def bags(kind, mode, call, padding_idx):
    last = call == "last offset"
    module = filled(
        CompressedEmbeddingBag,
        kind,
        mode=mode,
        include_last_offset=last,
        padding_idx=padding_idx,
    )
    return module, dense_like(module, nn.EmbeddingBag, mode=mode, include_last_offset=last)


@pytest.mark.parametrize("padding_idx", [None, 7, 3])
@pytest.mark.parametrize("call", BAG_CALLS)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("kind", KINDS)
def test_bag(kind, mode, call, padding_idx):
    """Bags of ids, empty bags, bags of nothing but padding."""
    module, dense = bags(kind, mode, call, padding_idx)
    run = BAG_CALLS[call]
    out, expected = run(module), run(dense)
    assert out.shape == expected.shape and out.dtype is expected.dtype
    torch.testing.assert_close(out, expected)
    check_gradient(module, dense, run)


@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("call", BAG_CALLS)
def test_bag_with_weights(call, padding_idx):
    module, dense = bags("additive", "sum", call, padding_idx)
    weights = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(3)) + 0.5
    found = []
    for one in (module, dense):
        own = weights.clone().requires_grad_()
        out = BAG_CALLS[call](one, own)
        (grad,) = torch.autograd.grad(out.square().sum(), own)
        found.append((out, grad))
    torch.testing.assert_close(*found)
    check_gradient(module, dense, lambda m: BAG_CALLS[call](m, weights))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        (torch.zeros(0, dtype=torch.long), torch.tensor([0, 0, 0])),
        (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(0, 4, dtype=torch.long), None),
    ],
    ids=["empty bags", "no bags", "0 x 4"],
)
def test_empty_bag_input(ids, offsets, padding_idx, mode):
    module = filled(CompressedEmbeddingBag, mode=mode, padding_idx=padding_idx)
    expected = dense_like(module, nn.EmbeddingBag, mode=mode)(ids, offsets)
    out = module(ids, offsets)
    assert out.shape == expected.shape and out.eq(0).all()
    out.sum().backward()
    assert module.codebooks.grad is None or module.codebooks.grad.eq(0).all()


WRONG_CALLS = {
    "1-D without offsets": lambda m: m(IDS[0]),
    "2-D with offsets": lambda m: m(IDS, torch.tensor([0])),
    "first offset not 0": lambda m: m(IDS[0], torch.tensor([1])),
    "offset too large": lambda m: m(IDS[0], torch.tensor([0, 5])),
    "2-D offsets": lambda m: m(IDS[0], torch.tensor([[0]])),
    "3-D": lambda m: m(IDS[None]),
    "weights of another shape": lambda m: m(IDS, per_sample_weights=torch.ones(3)),
    "weights with mean": lambda m: m(IDS, per_sample_weights=torch.ones(IDS.shape)),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_wrong_bag_calls_fail_as_in_torch(call):
    mode = "mean" if "mean" in call else "sum"
    module = filled(CompressedEmbeddingBag, mode=mode)
    caught = []
    for one in (module, dense_like(module, nn.EmbeddingBag, mode=mode)):
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as error:
            WRONG_CALLS[call](one)
        caught.append(error.type)
    assert caught[0] is caught[1]


@pytest.mark.parametrize("cls", [CompressedEmbedding, CompressedEmbeddingBag])
@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_id_out_of_range(cls, wrong):
    module = filled(cls, name="user")
    with pytest.raises(IndexError, match="user"):
        module(torch.tensor([[0, wrong]]))


@pytest.mark.parametrize("cls", [CompressedEmbedding, CompressedEmbeddingBag])
def test_ids_that_are_no_integers(cls):
    with pytest.raises(TypeError, match="user"):
        filled(cls, name="user")(torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", [CompressedEmbedding, CompressedEmbeddingBag])
def test_tables_of_other_dtypes(cls, dtype):
    module = filled(cls, codebook_dtype=dtype, dtype=dtype)
    out = module(IDS)
    assert out.dtype is dtype
    dense = dense_like(module, nn.EmbeddingBag if cls is CompressedEmbeddingBag else nn.Embedding)
    torch.testing.assert_close(out, dense(IDS))
    out.sum().backward()
    assert module.codebooks.grad.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_to_dtype_moves_the_output(kind, codebook_dtype, dtype):
    module = filled(CompressedEmbedding, kind, codebook_dtype)
    codes, before = module.codes.clone(), module(IDS)
    assert module.to(dtype)(IDS).dtype is dtype
    assert torch.equal(module.codes, codes) and module.codes.dtype is torch.uint8
    if codebook_dtype is torch.int8:
        assert module.codebooks.dtype is torch.int8
    torch.testing.assert_close(module(IDS).float(), before, rtol=0.05, atol=0.05)


def sharing():
    """Two modules over the same codes, and a third with the codebooks of the first."""
    a = filled(CompressedEmbedding)
    b = filled(CompressedEmbedding, seed=1, code_table=a.code_table)
    c = filled(CompressedEmbedding, seed=2, codebook_set=a.codebook_set)
    return nn.ModuleDict({"a": a, "b": b, "c": c})


def assert_shared(model):
    assert model["a"].codes is model["b"].codes
    assert model["a"].codebooks is model["c"].codebooks
    assert model["a"].codes is not model["c"].codes
    assert len(list(model.parameters())) == 2 and len(list(model.buffers())) == 5


MOVES = {
    "to": lambda m: m.to(torch.float64),
    "half and back": lambda m: m.half().float(),
    "deepcopy": copy.deepcopy,
    "deepcopy after to": lambda m: copy.deepcopy(m.to(torch.float64)),
}


@pytest.mark.parametrize("move", MOVES)
def test_sharing_survives(move):
    model = sharing()
    before = [module(IDS) for module in model.values()]
    assert_shared(model)
    moved = MOVES[move](model)
    assert_shared(moved)
    for module, out in zip(moved.values(), before, strict=True):
        torch.testing.assert_close(module(IDS).float(), out.float(), rtol=0.01, atol=0.01)


def test_deepcopy_is_independent():
    module = filled(CompressedEmbedding)
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone.codebooks.zero_()
        clone.codes.zero_()
    assert module(IDS).abs().max() > 0 and clone(IDS).eq(0).all()
    assert clone.layout == module.layout


@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, codebook_dtype):
    module = filled(CompressedEmbedding, kind, codebook_dtype)
    other = filled(CompressedEmbedding, kind, codebook_dtype, seed=9)
    assert not torch.equal(module(IDS), other(IDS))
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(module(IDS), other(IDS))


def test_state_dict_is_strict_both_ways():
    """Dense and compressed checkpoints are not mistaken for each other."""
    module, dense = filled(CompressedEmbedding), nn.Embedding(ROWS, DIM)
    with pytest.raises(RuntimeError, match="weight"):
        module.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match="codes"):
        dense.load_state_dict(module.state_dict())
    other = filled(CompressedEmbedding, "product")
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(module.state_dict())


def test_state_dict_holds_codes_and_codebooks_only():
    module = filled(CompressedEmbedding, codebook_dtype=torch.int8)
    state = module.state_dict()
    assert {key.rpartition(".")[2] for key in state} == {"codes", "codebooks", "scales"}
    layout = module.layout
    assert sum(t.nbytes for t in state.values()) == layout.code_bytes + layout.codebook_bytes


@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.int8])
def test_share_memory(codebook_dtype):
    module = filled(CompressedEmbedding, codebook_dtype=codebook_dtype)
    before = module(IDS)
    module.share_memory()
    assert module.codes.is_shared() and module.codebooks.is_shared()
    assert torch.equal(module(IDS), before)


def test_threads():
    """Lookups at once, forward and backward, give what one at a time gives."""
    module = filled(CompressedEmbedding)
    expected = module(IDS)
    results, errors = [], []

    def work():
        try:
            for _ in range(20):
                out = module(IDS)
                torch.autograd.grad(out.sum(), module.codebooks)
                results.append(torch.equal(out, expected))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and results == [True] * 80


COMPILED = {
    "embedding": lambda: (filled(CompressedEmbedding, padding_idx=7), (IDS,)),
    "product": lambda: (filled(CompressedEmbedding, "product"), (IDS.int(),)),
    "rows": lambda: (filled(CompressedEmbedding, "rows"), (IDS,)),
    "bag 2-D": lambda: (filled(CompressedEmbeddingBag, mode="sum"), (IDS,)),
    "bag offsets": lambda: (
        filled(CompressedEmbeddingBag, mode="mean", padding_idx=7),
        (IDS.flatten(), torch.tensor([0, 3])),
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compile_without_graph_breaks(case):
    module, args = COMPILED[case]()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = module(*args)
    (wanted,) = torch.autograd.grad(expected.square().sum(), module.codebooks)
    out = compiled(*args)
    (grad,) = torch.autograd.grad(out.square().sum(), module.codebooks)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.int8])
def test_compile_serves_changing_batch_sizes(codebook_dtype):
    module = filled(CompressedEmbedding, codebook_dtype=codebook_dtype)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (2, 5, 9):
        ids = torch.arange(size)
        assert torch.equal(compiled(ids), module(ids))


@pytest.mark.parametrize("case", ["embedding", "rows", "bag 2-D"])
def test_export(case):
    module, args = COMPILED[case]()
    model = nn.Sequential(module)
    exported = torch.export.export(model, args)
    assert torch.equal(exported.module()(*args), module(*args))
    operator = "mec_embed.bag" if "bag" in case else "mec_embed.lookup"
    assert any(operator in str(node.target) for node in exported.graph.nodes)


def functional(module):
    """Its parameters, and the call as a function of them."""
    params = {name: value.detach() for name, value in module.named_parameters()}
    return params, lambda p, ids=IDS: torch.func.functional_call(module, p, (ids,))


def test_functional_call_and_vmap():
    """Stateless calls and batched ids, as nn.Embedding allows."""
    module = filled(CompressedEmbedding)
    params, call = functional(module)
    params["codebook_set.codebooks"] = 2 * params["codebook_set.codebooks"]
    torch.testing.assert_close(call(params).square().sum(), 4 * module(IDS).square().sum())
    torch.testing.assert_close(torch.vmap(module)(IDS), module(IDS))


def transformed(case, padding="none"):
    """A module whose row 7 passes no gradient, and is zeros or kept as it is."""
    options = {} if padding == "none" else {"padding_idx": 7}
    if case != "bag":
        options["zero_padding"] = padding == "zeros"
    if case == "tiers":
        tier_map = TierMap.of(torch.arange(ROWS) % 5 == 0)
        layouts = [CodeLayout("additive", ROWS // 5, DIM, 3, 8)]
        layouts += [CodeLayout("additive", ROWS - ROWS // 5, DIM, 1, 4)]
        parts = [CompressedEmbedding(layout) for layout in layouts]
        for part in parts:
            part.codebook_set.store(torch.randn(part.codebooks.shape))
            size = part.layout.num_embeddings, part.layout.num_subvectors
            codes = torch.randint(part.layout.codebook_size, size)
            part.codes.copy_(pack(codes, part.layout.bits))
        return TieredEmbedding(tier_map, *parts, **options)
    cls = CompressedEmbeddingBag if case == "bag" else CompressedEmbedding
    kind = case if case in LAYOUTS else "additive"
    return filled(cls, kind, **options, **({"mode": "sum"} if case == "bag" else {}))


@pytest.mark.parametrize("padding", ["none", "zeros", "kept"])
@pytest.mark.parametrize("case", [*KINDS, "bag", "tiers"])
def test_functional_gradients(case, padding):
    """Of all, and of each call by itself."""
    module = transformed(case, padding)
    params, call = functional(module)

    def loss(values, ids):
        return call(values, ids).square().sum()

    module(IDS).square().sum().backward()
    found = torch.func.grad(loss)(params, IDS)
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, IDS[:, None])
    for name, parameter in module.named_parameters():
        wanted = parameter.grad.to_dense()
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found[name], wanted)
        torch.testing.assert_close(each[name].sum(0), wanted)


@pytest.mark.parametrize("padding", ["none", "zeros", "kept"])
@pytest.mark.parametrize("case", [*KINDS, "tiers"])
def test_forward_mode(case, padding):
    """Rows are linear in the codebooks, so that tangents are rows of other codebooks."""
    module = transformed(case, padding)
    params, rows = functional(module)
    tangents = {name: torch.randn_like(value) for name, value in params.items()}
    skipped = (padding != "none") & (IDS == 7)
    wanted = rows(tangents).detach().masked_fill(skipped[..., None], 0)
    out, found = torch.func.jvp(rows, (params,), (tangents,))
    assert torch.equal(out, module(IDS)) and wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(params[name], tangents[name]) for name in params}
        dual = forward_ad.unpack_dual(rows(duals))
    assert torch.equal(dual.primal, out)
    torch.testing.assert_close(dual.tangent, wanted)
    assert torch.equal(module(IDS), out)


def test_forward_mode_of_bags_is_refused_as_torchs_own():
    params, bags = functional(transformed("bag"))
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(bags, (params,), (params,))


class Scorer(nn.Module):
    """A table and a layer, for training in several processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = filled(CompressedEmbedding, padding_idx=7)
        self.layer = nn.Linear(DIM, 1)

    def forward(self, ids):
        return self.layer(self.table(ids)).square().mean()


def train_in_process():
    """Two steps of one of the processes, by its rank's half of the ids."""
    model = DistributedDataParallel(Scorer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS[dist.get_rank()]).backward()
        optimizer.step()
    return model.module.state_dict()


@pytest.mark.slow
def test_distributed_training_equals_one_process(tmp_path):
    """The mean loss over two processes is the mean loss over their batches together."""
    states = processes.run(train_in_process, 2, tmp_path)
    model = Scorer()
    start = model.table.codebooks.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS).backward()
        optimizer.step()
    for state in states:
        torch.testing.assert_close(state, dict(model.state_dict()))
    assert not torch.equal(model.table.codebooks, start)


def wrap_in_process():
    """Gradients and codes under the wrapper, and without it."""
    model, plain = DistributedDataParallel(Scorer()), Scorer()
    for one in (model, plain):
        one(IDS).backward()
    tables = model.module.table, plain.table
    return [table.codebooks.grad for table in tables], [table.codes for table in tables]


@pytest.mark.slow
def test_distributed_wrapper_finds_codebooks_and_leaves_codes_alone(tmp_path):
    """In a process of its own: the wrapper's clean-up may wait for gloo's threads for ever."""
    ((gradients, codes),) = processes.run(wrap_in_process, 1, tmp_path)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert torch.equal(*codes)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_decoded_and_differentiable(kind):
    module = filled(CompressedEmbedding, kind)
    weight = module.weight
    assert weight.shape == (ROWS, DIM)
    assert torch.equal(weight, module.dequantize()) and not module.dequantize().requires_grad
    torch.testing.assert_close(weight[IDS], module(IDS))
    found = [
        torch.autograd.grad(rows.square().sum(), module.codebooks)[0]
        for rows in (weight[IDS], module(IDS))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("value", [torch.zeros(ROWS, DIM), nn.Parameter(torch.zeros(ROWS, DIM))])
def test_weight_is_read_only(value):
    module = filled(CompressedEmbedding, name="user")
    with pytest.raises(AttributeError, match="table 'user': weight is read-only.*update"):
        module.weight = value
    assert "weight" not in dict(module.named_parameters())


def test_dequantize_in_chunks(monkeypatch):
    module = filled(CompressedEmbedding, padding_idx=7)
    whole = module.dequantize()
    monkeypatch.setattr("mec_embed.modules.DECODE_ROWS", 7)
    assert torch.equal(module.dequantize(), whole) and torch.equal(module.weight, whole)


@pytest.mark.parametrize(
    ("cls", "options", "parts"),
    [
        (CompressedEmbedding, {}, ["50, 6", "additive 3x8", "float32"]),
        (CompressedEmbedding, {"padding_idx": 0, "sparse": True}, ["padding_idx=0", "sparse=True"]),
        (CompressedEmbeddingBag, {"mode": "max"}, ["50, 6", "mode=max"]),
        (CompressedEmbedding, {"codebook_dtype": torch.int8}, ["int8"]),
    ],
)
def test_repr(cls, options, parts):
    text = repr(filled(cls, **options))
    assert all(part in text for part in parts) and cls.__name__ in text
    if not options:
        assert "padding_idx" not in text and "sparse" not in text


@pytest.mark.parametrize("cls", [CompressedEmbedding, CompressedEmbeddingBag])
def test_nonzero_padding_row_passes_no_gradient(cls):
    options = {} if cls is CompressedEmbedding else {"mode": "sum"}
    plain = filled(cls, **options)
    module = filled(cls, padding_idx=7, zero_padding=False, **options)
    assert torch.equal(module.weight[7], plain.weight[7]) and plain.weight[7].abs().max() > 0
    if cls is CompressedEmbedding:
        assert torch.equal(module(IDS), plain(IDS))
    dense = dense_like(module, nn.EmbeddingBag if options else nn.Embedding, **options)
    torch.testing.assert_close(module(IDS), dense(IDS))
    check_gradient(module, dense, lambda m: m(IDS))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad(requires_grad):
    module = filled(CompressedEmbedding, requires_grad=requires_grad)
    assert module.codebooks.requires_grad is requires_grad
    assert module(IDS).requires_grad is requires_grad


def test_int8_codebooks_are_frozen():
    module = filled(CompressedEmbedding, codebook_dtype=torch.int8)
    assert not list(module.parameters()) and not module(IDS).requires_grad


@pytest.mark.parametrize("count", [1, 3])
def test_quantize_is_within_half_a_step(count: int):
    values = torch.randn(count, 50, 8, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 0
    values[0, 1] *= 1e-5
    values[0, 2] *= 1e4
    codes, scales = quantize_codebooks(values)
    assert codes.dtype is torch.int8 and scales.dtype is torch.bfloat16
    step = scales.float()[..., None]
    peak_loss = (values.abs() - 127 * step).clamp(min=0)  # where the scale was rounded down
    error = (codes.float() * step - values).abs()
    assert (error <= step / 2 + peak_loss + 1e-7).all()
    assert codes[0, 0].eq(0).all()
    again = quantize_codebooks(codes.float() * step)
    assert again[0].equal(codes) and again[1].equal(scales)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e20])
def test_scales_of_codebooks_that_are_added_are_powers_of_two(size: float):
    values = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0)) * size
    values[1] *= 1e-6
    codes, scales = quantize_codebooks(values)
    assert torch.frexp(scales.float()).mantissa.eq(0.5).all()
    assert scales.eq(scales[:, :1]).all() and scales.is_contiguous()
    assert scales.max() == SCALE_RANGE * scales.min()
    assert codes.abs().amax((1, 2))[[0, 2]].ge(64).all()  # no more than one bit is lost
    _, alone = quantize_codebooks(values[:1])
    assert torch.frexp(alone.float()).mantissa.ne(0.5).any()
    zeros = quantize_codebooks(torch.zeros(2, 3, 4))
    assert not zeros[0].any() and zeros[1].gt(0).all()


@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.float16, torch.int8])
def test_thaw_and_freeze(codebook_dtype):
    """Codebooks can be trained as float32 for a while, int8 too, and are stored again."""
    books = CodebookSet(CodeLayout(*LAYOUTS["additive"], codebook_dtype))
    values = torch.randn(books.codebooks.shape, generator=torch.Generator().manual_seed(0))
    books.store(values)
    held, scales = books.codebooks, books.scales
    trainable = books.thaw()
    assert trainable.dtype is torch.float32 and trainable.requires_grad
    torch.testing.assert_close(trainable, values, rtol=0.02, atol=0.02)
    with torch.no_grad():
        trainable.mul_(-2)
    books.freeze(held, scales)
    assert books.codebooks is held and books.scales is scales
    decoded = held.float() if scales is None else held.float() * scales.float()[..., None]
    torch.testing.assert_close(decoded.detach(), -2 * values, rtol=0.04, atol=0.04)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cls", [CompressedEmbedding, CompressedEmbeddingBag])
def test_ids_out_of_range_read_the_row_that_is_named(cls, grad):
    layout = CodeLayout("additive", 20, 6, 3, 8)
    table = cls(layout, padding_idx=2)
    table.codebook_set.store(torch.randn(3, 8, 6))
    ids, known = torch.tensor([[3, 20, -1], [2, 5, 2**40]]), torch.tensor([[3, 7, 7], [2, 5, 7]])
    with torch.set_grad_enabled(grad):
        with pytest.raises(IndexError):
            table(ids)
        table.oov_row = 7
        assert torch.equal(table(ids), table(known))
        with pytest.raises(ValueError, match=r"oov_row must be in 0\.\.19 or None, got 20"):
            table.oov_row = 20
        for wrong in (1.5, "a", -1):
            with pytest.raises(ValueError, match=f"or None, got {wrong!r}"):
                table.oov_row = wrong
        assert copy.deepcopy(table).oov_row == 7


@pytest.mark.parametrize("padding_idx", [0, 3])
def test_one_row_for_all_has_its_padding(padding_idx):
    table = CompressedEmbedding(CodeLayout("shared", 5, 4, 1, 1), padding_idx=padding_idx)
    table.codebook_set.store(torch.ones(1, 1, 4))
    expected = torch.ones(5, 4)
    expected[padding_idx] = 0
    rows = table(torch.arange(5))
    assert torch.equal(rows, expected)
    rows.sum().backward()
    assert table.codebooks.grad.eq(4).all()
    with torch.no_grad():
        assert torch.equal(table(torch.arange(5)), expected)


@pytest.mark.parametrize("given", [[1, 2], None, 3])
@pytest.mark.parametrize("kind", ["rows", "tiers", "bags"])
def test_ids_that_are_no_tensor_are_named(kind, given):
    layout = CodeLayout("additive", 50, 4, 2, 4)
    table = CompressedEmbedding(layout, name="t")
    if kind == "tiers":
        halves = [CompressedEmbedding(CodeLayout("additive", 25, 4, 2, 4)) for _ in range(2)]
        table = TieredEmbedding(TierMap.of(torch.arange(50) < 25), *halves, name="t")
    if kind == "bags":
        table = CompressedEmbeddingBag(layout, name="t")
    message = f"'t': ids must be a tensor, got {type(given).__name__}"
    with pytest.raises(TypeError, match=message):
        table(given)
    with torch.no_grad(), pytest.raises(TypeError, match=message):
        table(given)


@pytest.mark.parametrize("what", ["offsets", "per_sample_weights"])
def test_arguments_of_bags_that_are_no_tensors_are_named(what):
    bag = CompressedEmbeddingBag(CodeLayout("additive", 50, 4, 2, 4), name="t", mode="sum")
    options = {"offsets": torch.tensor([0]), what: [0]}
    with pytest.raises(TypeError, match=f"'t': {what} must be a tensor, got list"):
        bag(torch.tensor([1]), **options)


@pytest.mark.parametrize("cls", [CompressedEmbedding, CompressedEmbeddingBag])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wrong", [-1, 50])
def test_one_row_for_all_checks_its_ids(cls, grad, wrong):
    table = cls(CodeLayout("shared", 50, 4, 1, 1), name="t")
    with torch.set_grad_enabled(grad):
        assert table(torch.tensor([[0, 49]])).shape[-1] == 4
        with pytest.raises(IndexError, match=rf"'t': id {wrong} is out of range, expected 0\.\.49"):
            table(torch.tensor([[3, wrong]]))
