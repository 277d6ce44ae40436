"""Check a recipe, or write or describe one.

python -m dnal_dist.recipe --schema            the JSON schema, for editors
python -m dnal_dist.recipe FILE [key=value]    check a recipe and print it with its defaults filled in
python -m dnal_dist.recipe --describe          every key, its type, default and meaning: docs/recipe.md
python -m dnal_dist.recipe --copy FOLDER       copy the packaged recipes, sweeps and Accelerate configs
python -m dnal_dist.recipe --new own.yaml --data data/own --model timm:mobilenetv3_large_100 --budget 0.3x
                                               write a first recipe for shards of your own
"""

import json
import shutil
from pathlib import Path

from dnal_dist.common.door import argument, door, parser_of
from dnal_dist.common.errors import InputError
from dnal_dist.common.shipped import shipped
from dnal_dist.recipe.draft import draft, write
from dnal_dist.recipe.loading import dump, load
from dnal_dist.recipe.reference import reference
from dnal_dist.recipe.schema import Recipe


@door
def main() -> None:
    parser = parser_of("dnal_dist.recipe", __doc__)
    checked = "recipe to check, a YAML file or the name of a packaged recipe; it is printed with its defaults filled in"
    parser.add_argument("recipe", nargs="?", help=checked)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example architecture.penalty_weight=0.02")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")
    parser.add_argument("--describe", action="store_true", help="print every key, its type, default and meaning, as Markdown")
    copy = "copy the packaged recipes, sweeps and Accelerate configs into a new folder"
    parser.add_argument("--copy", type=argument, metavar="FOLDER", help=copy)
    new = parser.add_argument_group("a first recipe for shards of your own")
    written = "write a commented recipe that trains well as it stands, by default to the name of the shards' folder with .yaml"
    new.add_argument("--new", nargs="?", type=argument, const=Path(), metavar="FILE", help=written)
    new.add_argument("--data", type=argument, metavar="FOLDER", help="the shards, with their index.json")
    new.add_argument("--model", metavar="NAME", help="the network, as model.name: timm:mobilenetv3_large_100, torchvision:resnet18")
    new.add_argument("--budget", default="0.3x", metavar="MACS", help="what it may cost, as architecture.target.macs (%(default)s)")
    new.add_argument("--image-size", type=int, metavar="N", help="pixels, if not those of the published weights")
    new.add_argument("--from-scratch", action="store_true", help="begin with random weights, even if some are published")
    args = parser.parse_intermixed_args()
    if args.schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2))
        return
    if args.describe:
        print(reference(), end="")
        return
    if args.new:
        if not args.data or not args.model:
            parser.error("--new wants --data and --model")
        path = Path(f"{args.data.resolve().name}.yaml") if args.new == Path() else args.new
        write(path, draft(path.stem, args.data, args.model, args.budget, args.image_size, args.from_scratch))
        print(f"{path}: read it, then: python -m dnal_dist.train {path}")
        return
    if not args.recipe and not args.copy:
        parser.error("give a recipe, --schema, --describe, --copy or --new")
    if args.copy:
        _copy(args.copy)
    else:
        print(dump(load(args.recipe, args.overrides)), end="")


def _copy(folder: Path) -> None:
    try:
        shutil.copytree(shipped("recipes"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise InputError(f"--copy {folder}: {error.strerror or error}; name a new folder") from None


if __name__ == "__main__":
    main()
