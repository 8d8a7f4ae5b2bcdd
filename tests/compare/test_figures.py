"""The figures of a comparison."""

from __future__ import annotations

import numpy as np

from trl_trustkl.compare import figures


def test_the_mean_line_covers_runs_of_different_lengths() -> None:
    x, y = figures._mean([(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])), (np.array([2.0]), np.array([4.0]))])
    assert x.tolist() == [1, 2, 3] and y.tolist() == [1, 3, 3]
