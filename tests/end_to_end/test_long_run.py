"""A long run leaks neither memory nor file handles."""

from __future__ import annotations

import gc

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_two_hundred_updates_leave_memory_and_file_handles_as_they_were(tmp_path):
    from benchmarks.soak import soak

    gc.collect()
    found = soak(tmp_path, updates=200)
    print(found)
    assert found["handles_at_the_end"] <= found["handles_at_the_start"]
    assert found["bytes_per_update_second_half"] < 20_000
