"""Base-model settings of each data set, chosen on its validation split."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """A model and how to train it.

    Attributes:
        hidden: widths of the MLP's hidden layers.
        l2: L2 penalty on the embedding tables, see `examples.ctr.training.train`.
        dim: embedding dimension.
        dropout: dropout probability of the MLP.
        batch_norm: batch normalisation in the MLP.
        lr: Adam's learning rate.
        batch_size: examples a step.
        epochs: most epochs to train.
        patience: epochs in a row without a better validation AUC before training stops.
        lr_decay: the learning rate is multiplied by this after each epoch without a better
            validation AUC.
        fuxictr_init: initial values as FuxiCTR draws them (tables N(0, 1e-4^2), layers Xavier).
        min_count: training occurrences an id needs to get a row of its own.
        distill_epochs: epochs of distillation after compressing.
        distill_mix: part of a batch of which columns are mixed then, see `mec_embed.distill`.
        self_distill_l2: ``l2`` of `mec_embed.self_distill`, where that is done before.
    """

    hidden: tuple[int, ...]
    l2: float
    dim: int = 40
    dropout: float = 0.0
    batch_norm: bool = False
    lr: float = 1e-3
    batch_size: int = 8192
    epochs: int = 20
    patience: int = 2
    lr_decay: float = 1.0
    fuxictr_init: bool = False
    min_count: int = 2
    distill_epochs: int = 4
    distill_mix: float = 0.5
    self_distill_l2: float = 5e-4


SETTINGS = {
    "amazonbook_kgat": Settings(hidden=(200, 100), l2=1e-3, batch_size=4096, epochs=30),
    "ml1m_ge4": Settings(
        hidden=(200, 100), l2=1e-5, lr=2e-3, distill_epochs=1, self_distill_l2=0.0
    ),
    "criteo_dac80k": Settings(
        hidden=(200, 100), l2=3e-3, dropout=0.5, batch_size=2048, distill_mix=0.0
    ),
    "generator": Settings(hidden=(64,), l2=3e-4, lr=2e-3, epochs=8, distill_epochs=1),
}
