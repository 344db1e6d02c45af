"""Put replacements in, under every alias, with all that follows them; all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Undo, adapted, do_nothing, held_optimizers
from .optimization import check_optimizer, keep_row_steps, trained_by
from .tables import Alias

logger = logging.getLogger("mec_embed")

#: Old parameter -> the (name, parameter) pairs that follow it in its optimizer.
Successors = dict[Tensor, list[tuple[str, nn.Parameter]]]
Replacement = tuple[tuple[Alias, ...], nn.Module, nn.Module]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

#: What dense and compressed modules hold by themselves; anything else a user has set.
_MODULE_ATTRIBUTES = frozenset(vars(nn.EmbeddingBag(1, 1))) | {
    "_fast",
    "_oov_row",
    "exchange",
    "layout",
    "name",
    "parts",
    "trainable",
    "zero_padding",
}


def replace_modules(
    model: nn.Module,
    replacements: Sequence[Replacement],
    optimizer: Optimizers = None,
    then: Callable[[], object] = do_nothing,
) -> None:
    """Put each new module in place of the old one under every alias; all or none.

    Args:
        model: that holds the old modules; what adapters know of it follows too.
        replacements: (aliases, old module, new module).
        optimizer: or several, in whose groups new parameters follow the old ones.
        then: what else belongs to the swap: if it raises, all is undone.
    """
    successors = _successors(replacements)
    optimizers = all_optimizers(model, optimizer)
    before = [(one, _lists(one), dict(one.state)) for one in optimizers]
    done: list[tuple[Alias, nn.Module]] = []
    undo: list[Undo] = []
    try:
        for aliases, old, new in replacements:
            for alias in aliases:
                done.append((alias, old))
                alias.parent._modules[alias.attribute] = new
        for one in optimizers:
            _rebind(one, successors)
            undo.append(keep_row_steps(one, model))
        for adapter, module, _ in list(adapted(model)):
            undo.append(adapter.follow(module, [(old, new) for _, old, new in replacements]))
        then()
    except BaseException:
        for step in reversed(undo):
            step()
        for alias, old in done:
            alias.parent._modules[alias.attribute] = old
        for one, lists, state in before:
            for group, values in zip(one.param_groups, lists, strict=True):
                group.update(values)
            one.state.clear()  # of what Adagrad's new parameters have started with, too
            one.state.update(state)
        raise


def _successors(replacements: Sequence[Replacement]) -> Successors:
    """What follows each parameter; hooks, mode and attributes are carried over on the way."""
    successors: Successors = {}
    for aliases, old, new in replacements:
        _carry_over(old, new)
        following = [(f"{aliases[0].name}.{name}", p) for name, p in new.named_parameters()]
        kept = {*new.parameters()}
        for param in old.parameters():
            if param in kept:
                continue
            # Codebooks that several modules share are followed by what follows each of these.
            successors.setdefault(param, []).extend(following)
    return successors


def all_optimizers(model: nn.Module, optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers given and those that the model holds, each once.

    Raises:
        TypeError: something else. ValueError: see :func:`keep_row_steps`.
    """
    both = [*listed(optimizer), *held_optimizers(model)]
    for one in both:
        check_optimizer(one)
    return list({id(one): one for one in both}.values())


def check_held(model: nn.Module, optimizer: Optimizers) -> None:
    """ValueError for an optimizer that was given but holds parameters of other models alone.

    Raises:
        TypeError: something that is no optimizer.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for one in listed(optimizer):
        held = trained_by(one)
        # One that held nothing but tables is empty while their codebooks are frozen.
        if held and own.isdisjoint(held):
            raise ValueError(
                f"optimizer {type(one).__name__} holds {len(held)} parameters, none of them of "
                "the model, expected one that trains it; give the model's own optimizer, or leave "
                "it out"
            )


def replace_parameters(optimizer: Optimizers, successors: dict[Tensor, Tensor]) -> None:
    """Let parameters take the place of others in optimizers; the state of these is dropped."""
    for one in listed(optimizer):
        for group in one.param_groups:
            for place, param in enumerate(group["params"]):
                if param in successors:
                    group["params"][place] = successors[param]
                    _start_state(one, group, successors[param])
                    one.state.pop(param, None)


def _lists(optimizer: torch.optim.Optimizer) -> list[dict[str, list[Any]]]:
    """Copies of what :func:`_rebind` changes in each group."""
    return [
        {name: list(group[name]) for name in ("params", "param_names") if name in group}
        for group in optimizer.param_groups
    ]


def listed(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers; TypeError for anything else."""
    if optimizer is None:
        return []
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for one in several:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
    return several


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Training mode, hooks and attributes that a user has set on the old module."""
    new.train(old.training)
    for name in _HOOKS:
        # The same dictionary, so that handles of hooks set before can still remove them.
        setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook
    for name, value in vars(old).items():
        if name not in _MODULE_ATTRIBUTES and not hasattr(new, name):
            setattr(new, name, value)


def _rebind(optimizer: torch.optim.Optimizer, successors: Successors) -> None:
    """Let new parameters follow old ones in their groups; the state of the old ones is dropped.

    A successor that several old parameters share enters once.
    """
    entered: set[int] = set()
    for group in optimizer.param_groups:
        names = group.get("param_names") or [""] * len(group["params"])
        entries: list[tuple[str, Tensor]] = []
        for name, param in zip(names, group["params"], strict=True):
            if param not in successors:
                entries.append((name, param))
                continue
            after = {id(entry[1]): entry for entry in successors[param]}
            fresh = [entry for key, entry in after.items() if key not in entered]
            entries += fresh
            for _, follower in fresh:
                _start_state(optimizer, group, follower)
            entered |= {id(entry[1]) for entry in fresh}
            optimizer.state.pop(param, None)
        group["params"] = [param for _, param in entries]
        if "param_names" in group:
            group["param_names"] = [name for name, _ in entries]


def _start_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], param: Tensor) -> None:
    """State that the first step would not make."""
    if group.get("fused") and isinstance(optimizer, torch.optim.SGD):
        # It takes momentum of all parameters or of none.
        others = (optimizer.state.get(other, {}) for other in group["params"])
        if any("momentum_buffer" in state for state in others):
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    # Of torch's own, Adagrad alone makes state when it is made.
    own = type(optimizer).__module__.startswith("torch.optim")
    if not own or isinstance(optimizer, torch.optim.Adagrad):
        made = _constructed_state(optimizer, group, param)
        if made:
            optimizer.state[param].update(made)


def _constructed_state(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], param: Tensor
) -> dict[str, Any]:
    """What the constructor gives a parameter of this group."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    for defaults in (optimizer.defaults, {}):  # not all take all of theirs; the group has them
        try:
            made = type(optimizer)([{**options, "params": [param]}], **defaults)
            return dict(made.state.get(param, {}))
        except Exception as error:  # of a class from elsewhere, anything
            logger.debug("%s cannot be made anew: %s", type(optimizer).__name__, error)
    return {}


def optimizer_groups(
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[int, tuple[int, int]]:
    """``id(parameter)`` -> (number of the optimizer, number of the group) that holds it."""
    return {
        id(param): (number, place)
        for number, one in enumerate(optimizers)
        for place, group in enumerate(one.param_groups)
        for param in group["params"]
    }
