"""Check what would fail later, before a GPU is spent on it.

python -m dnal_dist.doctor recipes/digits.yaml
python -m dnal_dist.doctor recipes/resnet50_imagenet.yaml --nodes 2 --processes-per-node 8 \\
    --config-file recipes/accelerate/ddp.yaml --time 12:00:00 --device-memory 80GB data.workers=8

Takes up to a minute and leaves no trace: files written for a check are removed, and the run folder is not created. Exit code 0:
nothing failed, though there may be warnings; 1: a check failed; 2: the recipe or the command line cannot be read.
"""

import argparse
import time

import psutil

from dnal_dist.common.door import argument, door, parser_of


def arguments() -> argparse.Namespace:
    parser = parser_of("dnal_dist.doctor", __doc__)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a YAML file such as recipes/digits.yaml")
    add("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
    add("--nodes", type=int, default=1, metavar="N", help="machines that train (default 1)")
    add("--processes-per-node", type=int, metavar="P", help="one for each GPU (default: as in the Accelerate config, else 1)")
    add("--config-file", type=argument, metavar="YAML", help="Accelerate config, for example recipes/accelerate/fsdp2.yaml")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="in place of the Accelerate config's")
    add("--time", metavar="TIME", help="time limit of the job, as for sbatch: 12:00:00, 1-12:00:00, 90")
    add("--grace", type=float, metavar="SECONDS", help="time between the signal to save and the job's end, as for slurm/submit.py")
    add("--cpu", action="store_true", help="the job has no GPUs: check the memory of this machine instead")
    add("--device-memory", metavar="AMOUNT", help="of one device of the job: 80GB, 24GiB")
    add("--partition", help="SLURM's, which must exist")
    add("--quick", action="store_true", help="start no processes and write no checkpoint")
    add("--json", action="store_true", help="print [{check, status, found, remedy}] instead of a table")
    return parser.parse_intermixed_args()


@door
def main() -> None:
    # Including the seconds of Python and its imports.
    begun = time.monotonic() - (time.time() - psutil.Process().create_time())
    args = arguments()
    # Not at the top: torch takes seconds, and --help does not need it.
    from dnal_dist.doctor.command import run

    run(args, begun)


if __name__ == "__main__":
    main()
