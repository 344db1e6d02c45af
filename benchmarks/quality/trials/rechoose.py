"""Trial: after distilling, choose the codes of all rows anew, then distill again.

``python -m benchmarks.quality.trials.rechoose --data amazonbook_kgat --model DNN --ratio 100``

The gradient ``g`` of the distillation loss is summed over one pass, for each row as it is decoded,
beside the Fisher matrix ``H`` of a lookup. The loss falls most, by its second-order model, at
``row - (n H)^-1 g`` (n lookups); codes are chosen for that target by the metric ``H``, and taken
where the model says that they are better than those before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.quality.common import Base
from benchmarks.quality.trials import common
from examples.ctr.training import evaluate
from mec_embed import CompressedEmbedding, distill
from mec_embed.distill import mixed
from mec_embed.learning.quantizers import AdditiveQuantizer
from mec_embed.packing import pack, unpack


def main() -> None:
    """Parse the command line and print the change of AUC after every step."""
    parser = common.parser(__doc__, data="amazonbook_kgat", model="DNN", ratio=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--damping", type=float, default=1.0, help="lookups added to n")
    options = parser.parse_args()
    base = common.base_of(options, options.seed)
    model = common.compressed(base, options.ratio)
    start = evaluate(base.model, base.data, "test").auc
    _tell("compressed", model, base, start)
    for number in range(options.rounds):
        _distill(model, base, base.settings.distill_epochs if not number else 2)
        _tell("distilled", model, base, start)
        if number + 1 < options.rounds:
            changed = rechoose(model, base, options.damping)
            _tell(f"codes chosen anew ({changed:.1%} of rows)", model, base, start)


def _tell(stage: str, model: torch.nn.Module, base: Base, start: float) -> None:
    valid, test = evaluate(model, base.data, "valid"), evaluate(model, base.data, "test")
    print(f"{stage}: valid {valid.auc:.5f}, test {test.auc - start:+.5f}", flush=True)  # noqa: T201


def _distill(model: torch.nn.Module, base: Base, epochs: int) -> None:
    distill(
        model,
        base.model,
        list(base.batches(base.seed + 1)),
        epochs=epochs,
        score=lambda one: evaluate(one, base.data, "valid").auc,
        seed=base.seed,
        progress=False,
    )


class _Gathered:
    """Gradients of the decoded rows of one table, and the Fisher matrix of its lookups."""

    def __init__(self, table: CompressedEmbedding) -> None:
        rows, dim = table.num_embeddings, table.embedding_dim
        self.gradient, self.lookups = torch.zeros(rows, dim), torch.zeros(rows)
        self.fisher = torch.zeros(dim, dim, dtype=torch.float64)


def gather(
    model: torch.nn.Module, base: Base, fisher: bool
) -> dict[CompressedEmbedding, _Gathered]:
    """One pass over the training batches: gradients of the loss, or squares of those of logits."""
    tables = [m for m in model.modules() if isinstance(m, CompressedEmbedding)]
    found = {table: _Gathered(table) for table in tables}
    usual = CompressedEmbedding._decode

    def decode(table: CompressedEmbedding, ids: Tensor) -> Tensor:
        rows = usual(table, ids).detach().requires_grad_()
        held = found[table]

        def add(grad: Tensor) -> None:
            flat = grad.reshape(-1, table.embedding_dim)
            if fisher:
                held.fisher += (flat.T @ flat).double()
                return
            held.gradient.index_add_(0, ids.reshape(-1), flat)
            used = flat.abs().sum(1).ne(0).float()
            held.lookups.index_add_(0, ids.reshape(-1), used)

        rows.register_hook(add)
        return rows * 1.0

    generator = torch.Generator().manual_seed(base.seed)
    CompressedEmbedding._decode = decode  # type: ignore[method-assign]
    fast = [(table, table._fast) for table in model.modules() if hasattr(table, "_fast")]
    for table, _ in fast:
        table._fast = _Slow()
    try:
        for batch in base.batches(base.seed + 2):
            ids, _ = mixed(batch, 0.5, generator)
            logits = model(ids)
            chance = base.model(ids).detach().sigmoid()
            if fisher:
                (logits * (chance * (1 - chance)).sqrt()).sum().backward()
            else:
                F.binary_cross_entropy_with_logits(logits, chance, reduction="sum").backward()
            model.zero_grad()
    finally:
        CompressedEmbedding._decode = usual  # type: ignore[method-assign]
        for table, path in fast:
            table._fast = path
    return found


class _Slow:
    """Leaves every lookup to the operators."""

    def rows(self, module: torch.nn.Module, ids: Tensor) -> None:
        """None: not served."""


def rechoose(model: torch.nn.Module, base: Base, damping: float) -> float:
    """Choose the codes of all additive tables anew; the part of rows that changed."""
    gradients, squares = gather(model, base, False), gather(model, base, True)
    changed = total = 0
    for table, held in gradients.items():
        layout = table.layout
        if layout.kind != "additive" or layout.embedding_dim == 1:
            continue
        lookups = held.lookups.sum().clamp(min=1)
        fisher = squares[table].fisher / float(lookups)
        fisher.diagonal().add_(0.05 * fisher.diagonal().mean() + 1e-12)
        values, vectors = torch.linalg.eigh(fisher)
        metric = (vectors * values.sqrt()) @ vectors.T
        ids = torch.arange(layout.num_embeddings)
        rows = table._decode(ids).detach()
        step = torch.linalg.solve(fisher, held.gradient.double().T).T
        target = rows - (step / (held.lookups[:, None] + damping)).float()
        words = table.codebook_set.values()
        measured = target @ metric.float(), words @ metric.float()
        codes = AdditiveQuantizer().encode(*measured, 16)
        old = unpack(table.codes, layout.num_subvectors, layout.bits, ids)
        quantizer = AdditiveQuantizer()
        errors = [
            (measured[0] - quantizer.decode(one, measured[1])).square().sum(1)
            for one in (old, codes)
        ]
        better = (errors[1] < errors[0] * 0.98) & (held.lookups > 0)
        table.codes.copy_(pack(torch.where(better[:, None], codes, old), layout.bits))
        changed, total = changed + int(better.sum()), total + len(ids)
    return changed / max(1, total)


if __name__ == "__main__":
    main()
