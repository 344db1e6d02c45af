"""How to call a model on a batch, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(batch)`` for a tensor or mapping, ``model(batch[0])`` for a tuple or list."""
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def prediction(output: Any) -> Tensor:
    """Logits or probabilities (batch,) from what a model returned; TypeError for no tensor."""
    if isinstance(output, Mapping) and "y_pred" in output:
        output = output["y_pred"]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}, expected a tensor of logits or "
            "probabilities; pass forward= to pick it"
        )
    return output.reshape(-1).float()


def check_batches(batches: Any) -> None:
    """TypeError for what is no iterable of batches."""
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"batches must be a list or a DataLoader of training batches, got "
            f"{type(batches).__name__}"
        )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
