"""Two real processes over gloo: how they communicate."""

import pytest


@pytest.mark.xdist_group("ddp")
def test_statistics_are_combined_and_differences_are_found(ranks):
    ranks.run("ddp", 2, "talk_between_ranks:talk")
