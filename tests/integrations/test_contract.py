"""The checks themselves, where the models do not need them."""

import contract
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode


def test_tensors_without_memory_are_not_counted() -> None:
    """Those that tests of exports leave behind in the process."""
    before = contract.held_tensors()
    with FakeTensorMode():
        fake = torch.empty(1_000_000)
    with FunctionalTensorMode():
        functional = FunctionalTensor.to_functional(torch.ones(10))
    assert contract.held_tensors() <= before + functional.nbytes
    real = torch.ones(1000)
    assert contract.held_tensors() >= before + real.nbytes
    del fake
