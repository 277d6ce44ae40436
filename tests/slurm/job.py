"""A run that a test has submitted to its cluster."""

import json
import re

from cluster import Cluster


class Job:
    """Submitted when it is made; arguments: those of slurm/submit.py."""

    def __init__(self, cluster: Cluster, run, *arguments, doctor: bool = False):
        self.cluster, self.run = cluster, run
        skip = () if doctor else ("--skip-doctor",)
        self.printed = cluster.submit(*skip, *arguments).stdout
        jobs = [json.loads(line)["job"] for line in (run / "submit" / "jobs.jsonl").read_text().splitlines()]
        self.number = jobs[-1]
        assert self.number.partition("_")[0] in self.printed

    def reach(self, *words: str) -> None:
        """Wait until the record with these words is there."""
        path = self.run / "metrics.jsonl"

        def is_there() -> bool:
            assert self.cluster.state(self.number) in ("PENDING", "RUNNING", "COMPLETING"), self.log
            lines = path.read_text().splitlines() if path.exists() else []
            return any(all(word in line for word in words) for line in lines)

        self.cluster.wait(is_there, 120, f"{words} of {self.run}\n{self.log}")

    def signal(self, name: str = "USR1") -> None:
        """To the batch script alone, as SLURM does before it takes a job's nodes."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)

    def stopped(self, times: int) -> str:
        """Wait for so many polite stops, and give the phase of the last."""
        found = []

        def are_told() -> bool:
            # A launcher repeats what a process said last.
            found[:] = re.findall(r"(?m)^(?:error: )?stopped \(.*\) in (\w+) after", self.log)
            return self.log.count("; requeued") >= times

        self.cluster.wait(are_told, 60, f"stop {times}\n{self.log}")
        return found[-1]

    def ended(self) -> str:
        return self.cluster.ended(self.number)

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.run.glob("submit/*/log*.txt")))
