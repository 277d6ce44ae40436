"""The pool of ranks that tests feed with jobs (tests/ranks.py) hides no fault of a job."""

import pytest
from ranks import RankError


@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize(
    ("job", "words"),
    [("fail", ["rank 1: ", "the error of this test"]), ("hang", ["2 of 2 ranks gave no answer within 8 s", "in hang"])],
)
def test_a_fault_of_a_job_fails_the_test_and_the_next_job_has_new_ranks(ranks, job, words):
    with pytest.raises(RankError) as error:
        ranks.run("ddp", 2, f"small_on_ranks:{job}", timeout=8 if job == "hang" else 60)
    assert all(word in str(error.value) for word in words)
    assert ranks.run("ddp", 2, "small_on_ranks:backend") == ["ddp", 2]
