"""Settings for the data sets of `benchmarks.quality.fuxictr_data`, as published for DeepFM."""

from __future__ import annotations

from examples.ctr.settings import Settings


def _published(l2: float, dropout: float, distill_epochs: int = 4) -> Settings:
    """What all four have in common, and what was tuned for each."""
    return Settings(
        hidden=(400, 400, 400),
        l2=l2,
        dim=10,
        dropout=dropout,
        batch_norm=True,
        lr=1e-3,
        batch_size=4096,
        epochs=100,
        patience=2,
        lr_decay=0.1,
        fuxictr_init=True,
        min_count=1,
        distill_epochs=distill_epochs,
    )


#: From the training logs of BARS (github.com/reczoo/BARS, ranking/ctr/DeepFM/DeepFM_*_x1), with
#: their mean test AUC of five runs. FuxiCTR besides clips gradients to norm 10 and keeps the
#: learning rate at 1e-6 or more. ``distill_epochs`` is ours: one epoch
#: of the two large sets is 8,058 and 6,910 steps. None was run on the full data here.
FUXICTR_SETTINGS: dict[str, Settings] = {
    "Criteo_x1": _published(l2=1e-5, dropout=0.1, distill_epochs=1),  # .8138
    "Avazu_x1": _published(l2=0.1, dropout=0.3, distill_epochs=1),  # .7646
    "Frappe_x1": _published(l2=0.05, dropout=0.2),  # .9839
    "MovielensLatest_x1": _published(l2=0.01, dropout=0.3),  # .9682
}
