"""DeepFM and DNN in plain PyTorch, with one ``nn.Embedding`` a field."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

INIT_STD = 0.01


class DNN(nn.Module):
    """A multilayer perceptron on the concatenated field embeddings.

    Args:
        fields: field names, F of them; the keys of ``embeddings`` (dots become underscores, as
            ``nn.ModuleDict`` allows none).
        rows: embedding rows of each field.
        dim: embedding dimension.
        hidden: widths of the hidden layers.
        dropout: dropout probability after every hidden layer.
        batch_norm: whether batch normalisation precedes every activation.
    """

    def __init__(
        self,
        fields: Sequence[str],
        rows: Sequence[int],
        dim: int = 40,
        hidden: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.embeddings = _tables(fields, rows, dim)
        self.mlp = _mlp(len(fields) * dim, hidden, dropout, batch_norm)

    def forward(self, ids: Tensor) -> Tensor:
        """Map int64 ids (B, F) to float logits (B,)."""
        return self.mlp(_look_up(self.embeddings, ids).flatten(1)).squeeze(1)


class DeepFM(DNN):
    """DNN plus a factorization machine on the same embeddings (Guo et al., 2017).

    Its first-order weights are embeddings of dimension 1 in ``first_order``, keyed by field like
    ``embeddings``. The arguments are those of `DNN`.
    """

    def __init__(
        self,
        fields: Sequence[str],
        rows: Sequence[int],
        dim: int = 40,
        hidden: Sequence[int] = (400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__(fields, rows, dim, hidden, dropout, batch_norm)
        self.first_order = _tables(fields, rows, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Map int64 ids (B, F) to float logits (B,)."""
        vectors = _look_up(self.embeddings, ids)
        linear = _look_up(self.first_order, ids).sum(dim=(1, 2))
        return linear + _second_order(vectors) + self.mlp(vectors.flatten(1)).squeeze(1)


def _tables(fields: Sequence[str], rows: Sequence[int], dim: int) -> nn.ModuleDict:
    """One embedding table (rows, dim) a field, drawn from N(0, INIT_STD^2)."""
    tables = nn.ModuleDict()
    for name, count in zip(fields, rows, strict=True):
        tables[name.replace(".", "_")] = table = nn.Embedding(count, dim)
        nn.init.normal_(table.weight, std=INIT_STD)
    return tables


def _mlp(inputs: int, hidden: Sequence[int], dropout: float, batch_norm: bool) -> nn.Sequential:
    """Hidden layers with ReLU, then a linear layer to one logit: (B, inputs) -> (B, 1)."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers.append(nn.Linear(inputs, width))
        if batch_norm:
            layers.append(nn.BatchNorm1d(width))
        layers.append(nn.ReLU())
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1))


def _look_up(tables: nn.ModuleDict, ids: Tensor) -> Tensor:
    """Field vectors (B, F, dim) of int64 ids (B, F)."""
    columns = zip(tables.values(), ids.unbind(dim=1), strict=True)
    return torch.stack([table(column) for table, column in columns], dim=1)


def _second_order(vectors: Tensor) -> Tensor:
    """Sum of the inner products of all field pairs: (B, F, dim) -> (B,)."""
    square_of_sum = vectors.sum(dim=1).square()
    sum_of_squares = vectors.square().sum(dim=1)
    return 0.5 * (square_of_sum - sum_of_squares).sum(dim=1)
