"""How to call a model on a batch, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """``model(batch)`` for a tensor or mapping, ``model(batch[0])`` for a tuple or list."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    try:
        return model(inputs)
    except TypeError as error:
        raise TypeError(
            f"{error}, as the model was given {type(inputs).__name__}; if it takes batches in "
            "another way, say how: forward=lambda model, batch: model(...)"
        ) from error


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


def check_batches(batches: Any, passes: int = 1) -> None:
    """TypeError for what is no iterable of batches, ValueError for one that ends too soon."""
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(
            f"batches must be a list or a DataLoader of training batches, got "
            f"{type(batches).__name__}"
        )
    if passes > 1 and isinstance(batches, Iterator) and not hasattr(batches, "__len__"):
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be gone through once, expected "
            f"{passes} times; pass a list or a DataLoader"
        )


@contextmanager
def grad_mode() -> Iterator[None]:
    """Gradients, and parameters that can train, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Sums and searches keep their precision, though the caller is within ``torch.autocast``."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def eager() -> AbstractContextManager[Any]:
    """What was compiled runs eagerly: compiled code does not see hooks that are set afterwards."""
    stance: Any = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    if stance is None or torch.compiler.is_compiling():
        return nullcontext()
    held: AbstractContextManager[Any] = stance("force_eager")
    return held


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
