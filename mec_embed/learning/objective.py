"""The MEC objective (Wang et al., arXiv 2502.15355): reconstruction, usage and contrast.

All distances are squared and relative to the weighted variance of the rows, so that the weights of
the terms mean the same for every table. Codes are hard; gradients reach the codebooks directly
through the codewords that each term names, so no straight-through estimator is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantizers import ProductQuantizer, Quantizer, weighted_error

BATCH_ROWS = 8192
#: Entries of the distances, or targets, of one batch, at most: several such arrays live at once.
BATCH_DISTANCES = 1 << 20
#: Adam's learning rate, relative to the root of the mean squared error of the rows: the smaller
#: that is, the smaller the steps that keep what the start has found.
LEARNING_RATE = 3e-3
#: Of a softmax: what is less than exp of this is nothing.
_LEAST_LOGIT = -60.0

#: Told the name of a stage and the relative weighted error after it.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Weights:
    """Weights of the terms beside the reconstruction, whose weight is 1."""

    usage: float
    contrastive: float


def code_distances(targets: Tensor, codebooks: Tensor) -> Tensor:
    """Squared distances (n, M, K) of targets (n, M, S) to each codeword of their codebook."""
    # |t|^2 - 2 t.c + |c|^2 in one product, and one for its gradient: passes over (n, M, K) cost
    # more than products do.
    left = torch.stack([targets.square().sum(2), torch.ones_like(targets[:, :, 0])], dim=2)
    left = torch.cat([targets, left.to(targets)], dim=2).transpose(0, 1)
    norms = codebooks.square().sum(2, keepdim=True)
    right = torch.cat([-2 * codebooks, torch.ones_like(norms), norms], dim=2).transpose(1, 2)
    return torch.bmm(left, right).transpose(0, 1)


def reconstruction_loss(x: Tensor, decoded: Tensor, weights: Tensor) -> Tensor:
    """Popularity-weighted mean squared error of rows (n, D); weights (n,) have mean 1."""
    return (weights * (x - decoded).square().sum(1)).mean()


def usage_loss(distances: Tensor, weights: Tensor, temperature: Tensor) -> Tensor:
    """How far the popularity-weighted use of the codewords is from even: 0 (even) to 1 (collapse).

    ``1 - H(p) / log K`` averaged over codebooks, where p (K,) is the weighted mean over rows of
    the soft assignment ``softmax(-distance / temperature)``. The authors' hard one-hots have no
    gradient; soft ones do.

    Args:
        distances: (n, M, K) from :func:`code_distances`.
        weights: (n,) popularity weights.
        temperature: scalar, about the distance to the nearest codeword.
    """
    use = _SoftUse.apply(distances, weights / weights.sum(), temperature)
    entropy = -(use * use.clamp(min=1e-12).log()).sum(1)
    return (1 - entropy / math.log(distances.shape[2])).mean()


class _SoftUse(torch.autograd.Function):
    """Sum over rows of share (n,) * softmax(-distances / temperature): (n, M, K) -> (M, K)."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, share: Tensor, temperature: Tensor) -> Tensor:
        """Largest first, everything in place."""
        distances = distances.transpose(0, 1)
        logits = (distances.amin(2, keepdim=True) - distances).div_(temperature)
        # What is smaller makes no difference, but arithmetic on denormal numbers is slow.
        soft = F.softmax(logits.clamp_(min=_LEAST_LOGIT), dim=2)
        ctx.save_for_backward(soft, share, temperature)
        return share @ soft

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of the distances alone."""
        soft, share, temperature = ctx.saved_tensors
        mean = soft @ grad[:, :, None]
        slope = (mean - grad[:, None]).mul_(soft).mul_((share / temperature)[:, None])
        return slope.transpose(0, 1), None, None


def contrastive_loss(
    codes: Tensor,
    distances: Tensor,
    weights: Tensor,
    temperature: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """A row against its own codes (positive) and the same with one replaced (negative).

    ``-log sigmoid((d_negative - d_positive) / temperature)``: InfoNCE with one negative a row. In
    the negative, one random position holds another random code; its squared distance is that of
    the replaced codeword to the target, as the other codewords stay.

    Args:
        codes: (n, M).
        distances: (n, M, K) from :func:`code_distances`.
        weights: (n,) popularity weights of mean 1.
        temperature: scalar, about the distance to the nearest codeword.
        generator: draws the positions and codes.
    """
    rows, count, size = distances.shape
    place = torch.randint(count, (rows,), generator=generator).to(codes.device)
    shift = torch.randint(1, size, (rows,), generator=generator).to(codes.device)
    own = codes.gather(1, place[:, None])
    pair = torch.cat([(own + shift[:, None]) % size, own], dim=1) + (place * size)[:, None]
    # d_negative - d_positive: all other codewords cancel out.
    negative, positive = distances.flatten(1).gather(1, pair).unbind(1)
    gap = negative - positive
    return (weights * F.softplus(-gap / temperature)).mean()


def train_codebooks(
    x: Tensor,
    weights: Tensor,
    codes: Tensor,
    codebooks: Tensor,
    quantizer: Quantizer,
    terms: Weights,
    epochs: int,
    seed: int,
    progress: Progress,
) -> tuple[Tensor, list[dict[str, float]]]:
    """Minimise the objective by mini-batches from given codes and codebooks.

    In each batch, the codes of one random position are chosen anew before the step, so that codes
    follow the codebooks.

    Args:
        x: rows (n, D) float32 of weighted variance 1.
        weights: (n,) popularity weights of mean 1.
        codes: (n, M), changed in place.
        codebooks: (M, K, S).
        quantizer: of these codes.
        terms: weights of the terms.
        epochs: passes over ``x``.
        seed: of batches and negatives.
        progress: told (stage, reconstruction loss) after every epoch.

    Returns:
        Codebooks (M, K, S), and for each epoch the mean of each term that is on.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = codebooks.clone().requires_grad_()
    error = weighted_error(x, weights, codes, codebooks, quantizer)
    count, size, width = codebooks.shape
    batch_rows = min(BATCH_ROWS, max(1, BATCH_DISTANCES // (count * max(size, width))))
    steps = epochs * -(-len(x) // batch_rows)
    adam = _Adam(parameter, LEARNING_RATE * error.sqrt().item(), steps)
    history = []
    for epoch in range(epochs):
        sums: dict[str, float] = {}
        for batch in torch.randperm(len(x), generator=generator).split(batch_rows):
            batch = batch.to(codes.device)
            losses = _batch_losses(
                x[batch], weights[batch], codes, batch, parameter, quantizer, terms, generator
            )
            total = torch.stack([weight * loss for weight, loss in losses.values()]).sum()
            adam.step(torch.autograd.grad(total, parameter)[0])
            for name, (_, loss) in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.item() * len(batch) / len(x)
        history.append(sums)
        progress(f"MEC epoch {epoch + 1}/{epochs}", sums["reconstruction"])
    return parameter.detach(), history


class _Adam:
    """Adam (Kingma and Ba, 2015) whose rate falls to 0 along a cosine.

    The first step of ``torch.optim`` imports torch's compiler: a second, and tens of megabytes.
    """

    momentum, memory, least = 0.9, 0.999, 1e-8

    def __init__(self, parameter: Tensor, rate: float, steps: int) -> None:
        self.parameter, self.rate, self.steps, self.taken = parameter.detach(), rate, steps, 0
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def step(self, gradient: Tensor) -> None:
        """Move the parameter in place."""
        rate = self.rate * (1 + math.cos(math.pi * self.taken / self.steps)) / 2
        self.taken += 1
        self.mean.lerp_(gradient, 1 - self.momentum)
        self.square.mul_(self.memory).addcmul_(gradient, gradient, value=1 - self.memory)
        root = (self.square / (1 - self.memory**self.taken)).sqrt_().add_(self.least)
        rate /= 1 - self.momentum**self.taken
        self.parameter.addcdiv_(self.mean, root, value=-rate)


def _batch_losses(
    x: Tensor,
    weights: Tensor,
    codes: Tensor,
    batch: Tensor,
    codebooks: Tensor,
    quantizer: Quantizer,
    terms: Weights,
    generator: torch.Generator,
) -> dict[str, tuple[float, Tensor]]:
    """Each term that is on: name -> (weight, loss); re-chooses ``codes[batch]`` at one position."""
    place = int(torch.randint(codes.shape[1], (1,), generator=generator))
    with torch.no_grad():
        target = quantizer.targets(x, codes[batch], codebooks)[:, place]
        codes[batch, place] = ProductQuantizer().encode(target, codebooks[place, None], 1)[:, 0]
    own = codes[batch]
    decoded = quantizer.decode(own, codebooks)
    losses = {"reconstruction": (1.0, reconstruction_loss(x, decoded, weights))}
    if not (terms.usage or terms.contrastive):
        return losses
    targets = quantizer.targets(x, own, codebooks.detach())
    distances = code_distances(targets, codebooks)
    temperature = distances.detach().amin(2).mean().clamp(min=1e-12)
    if terms.usage:
        losses["usage"] = (terms.usage, usage_loss(distances, weights, temperature))
    if terms.contrastive:
        loss = contrastive_loss(own, distances, weights, temperature, generator)
        losses["contrastive"] = (terms.contrastive, loss)
    return losses
