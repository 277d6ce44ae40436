"""What slurm/train.sbatch sees of a training, without torch: records, checkpoints, and a stop at a step's edge with exit code 75.

For tests of what SLURM and the batch script do. It stands where a container's program would, so that the script around it is the
one that is shipped: stand_in.py exec --bind ... IMAGE accelerate launch --machine_rank N ... -m dnal_dist.train RECIPE
"""

import glob
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml

PHASES = ("pretrain", "search", "finetune")
STEP_SECONDS = 0.05
STOPPED = 75


class Training:
    """The main process."""

    def __init__(self, path: Path):
        self.recipe = yaml.safe_load(path.read_text())
        self.run = Path(self.recipe["output"])
        if not glob.glob(self.recipe["data"]["train"]):
            sys.exit(f"error: key 'data.train': no shard matches '{self.recipe['data']['train']}'")
        self.signal = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, _: setattr(self, "signal", signal.Signals(number).name))
        (self.run / "checkpoints").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, self.run / "recipe.yaml")

    def record(self, kind: str, **values) -> None:
        with (self.run / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")

    def train(self) -> None:
        phases = PHASES[:1] if "--until" in sys.argv else PHASES
        edges = [(phase, step) for phase in phases for step in range(1, (self.recipe["phases"][phase].get("steps") or 0) + 1)]
        checkpoints, log = self.run / "checkpoints", self.run / "metrics.jsonl"
        saved = sorted(folder.name for folder in checkpoints.iterdir())
        done = int(saved[-1].split("-")[1]) if saved else 0
        # Steps after the checkpoint are taken again, and recorded once.
        kept = [line for line in log.read_text().splitlines() if json.loads(line).get("global_step", 0) <= done] if saved else []
        log.write_text("".join(f"{line}\n" for line in kept))
        (checkpoints / f"step-{done:08d}-{edges[done][0]}").mkdir(exist_ok=True)
        self.record("start", resumed=bool(saved))
        for number, (phase, step) in enumerate(edges[done:], done + 1):
            time.sleep(STEP_SECONDS)
            self.record("train", phase=phase, step=step, global_step=number)
            while (self.run / "hang").exists():  # whatever signals come
                time.sleep(STEP_SECONDS)
            stop = self.run / "stop"
            reason = self.signal or (f"{stop} is there" if stop.exists() else None)
            if reason or number % (self.recipe["checkpoint"].get("every_steps") or len(edges)) == 0:
                (checkpoints / f"step-{number:08d}-{phase}").mkdir()
            if reason:
                stop.unlink(missing_ok=True)
                self.record("stop", phase=phase, step=step, reason=reason)
                print(f"stopped ({reason}) in {phase} after {step} steps", file=sys.stderr)
                sys.exit(STOPPED)
        if phases != PHASES:
            (checkpoints / f"step-{len(edges):08d}-search").mkdir()
            return
        self.record("end")


def follow(run: Path) -> None:
    """On the other nodes: end as the main process does."""
    begun, path = time.time(), run / "metrics.jsonl"
    while True:
        time.sleep(STEP_SECONDS)
        for line in path.read_text().splitlines() if path.exists() else []:
            if '"kind": "end"' in line:
                return
            if '"kind": "stop"' in line and json.loads(line)["time"] > begun:
                sys.exit(STOPPED)


def main() -> None:
    words = sys.argv[1:]
    recipe = Path(words[words.index("dnal_dist.train") + 1])
    if words[words.index("--machine_rank") + 1] == "0":
        Training(recipe).train()
    else:
        follow(Path(yaml.safe_load(recipe.read_text())["output"]))


if __name__ == "__main__":
    main()
