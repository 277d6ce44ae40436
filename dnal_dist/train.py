"""Train a recipe, from its shards to the compact network and the report.

python -m dnal_dist.recipe --copy recipes        the packaged recipes and Accelerate configs, where this is not a checkout
python -m dnal_dist.train digits                 or recipes/digits.yaml
python -m dnal_dist.train digits architecture.penalty_weight=0.02 seed=3 output=runs/other
python -m dnal_dist.train resnet50_imagenet --init-from torchvision:resnet50 phases.pretrain.steps=0
accelerate launch --config_file recipes/accelerate/ddp.yaml -m dnal_dist.train digits

The same command resumes a run that was stopped, on any number of processes and any backend. SIGTERM, Ctrl-C, SIGUSR1 or a file
named `stop` in the run folder stop it: it saves and exits with 75, "try again". Other codes: 0 finished, 2 wrong input,
a disk that fails or training that diverged (the last line names it), 3 trained, but the target was missed, 130 a second Ctrl-C.
"""

import argparse
import json

from dnal_dist.common.door import door, parser_of


@door
def main() -> None:
    args = _arguments()
    source = []
    if args.init_from is not None:
        # As JSON, since YAML would read some names as other types. A recipe may begin with published weights otherwise.
        source = [f"model.init_from={json.dumps(args.init_from, ensure_ascii=False)}", "model.pretrained=false"]
    # Torch and everything else is imported after the arguments have been parsed.
    from dnal_dist.training import command

    command.run_recipe(
        args.recipe, [*args.overrides, *source], args.overwrite, args.allow_changed, args.max_time, args.profile, args.until
    )


def _arguments() -> argparse.Namespace:
    parser = parser_of("dnal_dist.train", __doc__)
    parser.add_argument(
        "recipe",
        help="a YAML file, or the name of a packaged recipe such as digits; `python -m dnal_dist.recipe --schema` has all keys",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: dotted keys, YAML values")
    parser.add_argument(
        "--init-from",
        metavar="SOURCE",
        help="initial weights, the same as model.init_from=SOURCE: torchvision:resnet50 (or vgg16_bn, mobilenet_v2), a run "
        "folder, a folder of its checkpoints, or a .safetensors file; phases.pretrain.steps=0 begins the search with them",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="resume from the run folder's last checkpoint: the default")
    folder.add_argument("--overwrite", action="store_true", help="remove the run in the run folder and start again")
    parser.add_argument(
        "--allow-changed",
        metavar="KEY",
        action="append",
        default=[],
        help="resume although this key of the recipe (or those under it) has changed since the run began; repeatable",
    )
    parser.add_argument(
        "--max-time",
        metavar="TIME",
        help="save and exit with 75 before so much time has passed (3h30m, 90m); the end of a SLURM job is respected anyway",
    )
    parser.add_argument(
        "--until",
        choices=("pretrain", "search"),
        help="end behind this phase, with 0; the same command without it goes on. Runs whose pretrain is the same can share one: "
        "--init-from RUN phases.pretrain.steps=0",
    )
    parser.add_argument(
        "--profile",
        nargs="?",
        type=int,
        const=10,
        metavar="STEPS",
        help="trace so many steps of each phase (default: 10) with torch.profiler into RUN/profile; on a GPU, training then waits "
        "for the device at each span, so that the time breakdown of the report is exact",
    )
    # Options may stand between overrides.
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    main()
