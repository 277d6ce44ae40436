"""Two real processes over gloo: how they talk."""

import pytest
from launching import launch, succeed

pytestmark = pytest.mark.timeout(1000)


def test_what_is_equal_afterwards():
    found = succeed(launch("ddp", 2, "tests/distributed/talk_between_ranks.py"))
    # Both write at once, so a line of one may lie within the other's.
    assert all(f"rank {rank} done" in found.stdout for rank in (0, 1))
