"""Run by test_recipes on each process: one run after the other, each from its recipe to its compact network.

accelerate launch ... tests/distributed/recipes_on_ranks.py RUNS      (a JSON file: for each run its recipe and its overrides)
"""

import gc
import json
import sys
from pathlib import Path

from dnal_dist import recipe
from dnal_dist.distributed.context import Parallel
from dnal_dist.training import phases, setup


def main(runs: str) -> None:
    parallel = Parallel()
    for path, *overrides in json.loads(Path(runs).read_text()):
        print(f"rank {parallel.rank}: {path}", flush=True)
        run = setup.assemble(recipe.load(path, overrides), parallel)
        phases.go(run)
        assert run.phase == "done", run.phase
        assert run.saver.finish()
        run.track.close()
        run.close()
        # Each phase collects garbage, and would look through all that the modules hold.
        gc.freeze()
    parallel.close()
    print(f"rank {parallel.rank} done", flush=True)
    parallel.leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
