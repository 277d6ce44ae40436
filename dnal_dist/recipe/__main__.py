"""python -m dnal_dist.recipe --schema            the JSON schema, for editors
python -m dnal_dist.recipe FILE [key=value]    check a recipe and print it with its defaults filled in
"""

import argparse
import json
import sys

from dnal_dist.common.errors import InputError
from dnal_dist.recipe.loading import dump, load
from dnal_dist.recipe.schema import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dnal_dist.recipe", description="Check a recipe, or print the schema of all.")
    parser.add_argument("recipe", nargs="?", help="YAML file to check; it is printed with its defaults filled in")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example architecture.penalty_weight=0.02")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")
    args = parser.parse_intermixed_args()
    if args.schema:
        print(json.dumps(Recipe.model_json_schema(), indent=2))
        return
    if not args.recipe:
        parser.error("give a recipe, or --schema")
    try:
        print(dump(load(args.recipe, args.overrides)), end="")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
