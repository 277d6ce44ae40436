"""Run by test_recipes on each process: one run after the other, each from its recipe to its compact network.

accelerate launch ... tests/distributed/recipes_on_ranks.py RUNS      (a JSON file: for each run its recipe and its overrides)
"""

import gc
import json
import sys
from pathlib import Path

from dnal_dist import recipe
from dnal_dist.distributed.context import Context
from dnal_dist.training import phases, setup


def main(runs: str) -> None:
    context = Context()
    for path, *overrides in json.loads(Path(runs).read_text()):
        print(f"rank {context.rank}: {path}", flush=True)
        run = setup.prepare(recipe.load(path, overrides), context)
        phases.train(run)
        assert run.state.phase == "done", run.state.phase
        assert run.writer.finish()
        run.log.close()
        run.close()
        # Each phase collects garbage, and would look through all that the modules hold.
        gc.freeze()
    context.close()
    print(f"rank {context.rank} done", flush=True)
    context.leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
