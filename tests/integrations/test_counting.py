"""Ids of frameworks' columns, as whole numbers."""

import numpy as np
import pytest

from mec_embed.integrations.counting import whole_numbers


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, object])
def test_whole_numbers_of_any_dtype(dtype: type) -> None:
    ids = whole_numbers("item", np.array([[3, 0], [7, 1]], dtype=dtype))
    assert ids.dtype == np.int64 and ids.tolist() == [[3, 0], [7, 1]]


@pytest.mark.parametrize(
    "values",
    [np.array([1.5]), np.array([1.5], dtype=object), np.array([2**63 + 5], dtype=np.uint64)],
    ids=["float", "object", "unsigned"],
)
def test_other_numbers_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="feature 'item': ids must be whole numbers, got"):
        whole_numbers("item", values)
