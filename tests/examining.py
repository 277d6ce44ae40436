"""What the tests of the doctor's checks share."""

from dnal_dist.doctor.case import Case, bounded


def found(check, case: Case, status: str, words: str, remedy: str = "") -> None:
    one = bounded(check, case, 60)
    assert one.status == status and words in one.found and remedy in one.remedy, one
    assert bool(one.remedy) == (status != "pass") and "\n" not in one.found + one.remedy, one
