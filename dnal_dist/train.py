"""Train a recipe, from its shards to the compact network and the report.

python -m dnal_dist.train recipes/digits.yaml
python -m dnal_dist.train recipes/digits.yaml architecture.penalty_weight=0.02 seed=3 output=runs/other
python -m dnal_dist.train recipes/resnet50_imagenet.yaml --init-from torchvision:resnet50 phases.pretrain.steps=0
accelerate launch --config_file recipes/accelerate/ddp.yaml -m dnal_dist.train recipes/digits.yaml

The same command again goes on where the run stopped, on any number of processes and any backend. SIGTERM, Ctrl-C, SIGUSR1 or a file
named `stop` in the run folder end it politely: it saves and exits with 75, "try again". Other codes: 0 done, 2 something that was
given is wrong (the last line says what), 3 trained, but the target was missed, 130 a second Ctrl-C.
"""

import argparse
import json
import multiprocessing
import signal
import sys
from pathlib import Path

from dnal_dist import recipe
from dnal_dist.common.errors import InputError
from dnal_dist.distributed.context import Context
from dnal_dist.tracking import values
from dnal_dist.tracking.run_log import CLOSE_SECONDS
from dnal_dist.training import exit, phases, stopping
from dnal_dist.training.setup import assemble
from dnal_dist.training.stopping import Edges

# Exit code of a run that trained to its end, but whose network does not meet the recipe's target.
MISSED = 3


def main() -> None:
    args = _arguments()
    signals = stopping.Signals(_interrupt)
    context = run = None
    try:
        # As JSON, since YAML would make something else of some names.
        given = [] if args.init_from is None else [f"model.init_from={json.dumps(args.init_from, ensure_ascii=False)}"]
        settings = recipe.load(args.recipe, [*args.overrides, *given])
        until = stopping.limit(args.max_time)
        values.require(settings.tracking.tracker)
        context = Context(settings.tracking.tracker, settings.output)
        # To let go of a tracker that hangs takes four seconds more.
        leaving = 0.0 if settings.tracking.tracker == "none" else CLOSE_SECONDS + 5.0
        edges = Edges(context, signals, Path(settings.output) / "stop", until, leaving)
        run = assemble(settings, context, edges, args.overwrite, args.allow_changed)
        signals.training = True
        phases.go(run)
        missed = exit.finish(run)
        if missed and context.main:
            exit.say_why(f"error: {missed}")
        run.close()
        context.leave(MISSED if missed else 0)
        if missed:
            sys.exit(MISSED)
    except stopping.Stopped as stopped:
        exit.leave(run, signals, str(stopped))
    except InputError as error:
        exit.refuse(run, context, signals, error)
    except KeyboardInterrupt:
        exit.interrupted(run, signals)
    except RuntimeError as error:
        # Where all is being stopped, a peer or a loader may be gone before the signal to this process comes.
        loader_died = "DataLoader worker" in str(error)
        stopping_all = isinstance(error.__context__, KeyboardInterrupt)
        if stopping_all or ((loader_died or (context is not None and context.world_size > 1)) and exit.signalled(signals)):
            exit.interrupted(run, signals)
        if not loader_died:
            raise
        why = str(error).splitlines()[0].rstrip(". ")
        told = f"key 'data.workers': a loader process died ({why}); lower it, or give the machine more (shared) memory"
        exit.refuse(run, context, signals, InputError(told, local=True))
    finally:
        if run is not None:
            run.close()


def _interrupt() -> None:
    # The same signal may have ended loaders too. Torch would raise an error for each, whatever this process is doing by then.
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # At once: a loader that is left in the middle of handing over a batch prints a traceback.
    for loader in multiprocessing.active_children():
        loader.kill()
    raise KeyboardInterrupt


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dnal_dist.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe", help="a YAML file such as recipes/digits.yaml; `python -m dnal_dist.recipe --schema` has all keys"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
    parser.add_argument(
        "--init-from",
        metavar="SOURCE",
        help="weights to begin with, the same as model.init_from=SOURCE: torchvision:resnet50 (or vgg16_bn, mobilenet_v2), a run "
        "folder, a folder of its checkpoints, or a .safetensors file; phases.pretrain.steps=0 begins the search with them",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint: what is done anyway")
    folder.add_argument("--overwrite", action="store_true", help="remove the run that the run folder holds and start anew")
    parser.add_argument(
        "--allow-changed",
        metavar="KEY",
        action="append",
        default=[],
        help="go on although this key of the recipe (or those under it) has changed since the run began; may be given again",
    )
    parser.add_argument(
        "--max-time",
        metavar="TIME",
        help="save and exit with 75 in time to be over after so long (3h30m, 90m); a SLURM job's own end is heeded anyway",
    )
    # Options may stand between overrides.
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
