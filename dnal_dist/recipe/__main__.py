"""python -m dnal_dist.recipe --schema            the JSON schema, for editors
python -m dnal_dist.recipe FILE [key=value]    check a recipe and print it with its defaults filled in
python -m dnal_dist.recipe --copy FOLDER       copy the packaged recipes, sweeps and Accelerate configs
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from dnal_dist.common.errors import InputError
from dnal_dist.common.shipped import shipped
from dnal_dist.recipe.loading import dump, load
from dnal_dist.recipe.schema import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dnal_dist.recipe", description="Check a recipe, or print the schema of all.")
    parser.add_argument(
        "recipe",
        nargs="?",
        help="recipe to check, a YAML file or the name of a packaged recipe; it is printed with its defaults filled in",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example architecture.penalty_weight=0.02")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")
    parser.add_argument(
        "--copy", type=Path, metavar="FOLDER", help="copy the packaged recipes, sweeps and Accelerate configs into a new folder"
    )
    args = parser.parse_intermixed_args()
    if args.schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2))
        return
    if not args.recipe and not args.copy:
        parser.error("give a recipe, --schema or --copy")
    try:
        if args.copy:
            _copy(args.copy)
            return
        print(dump(load(args.recipe, args.overrides)), end="")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _copy(folder: Path) -> None:
    try:
        shutil.copytree(shipped("recipes"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise InputError(f"--copy {folder}: {error.strerror or error}; name a new folder") from None


if __name__ == "__main__":
    main()
