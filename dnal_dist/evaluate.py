"""Accuracy of a run's network, or of an export in its runtime, class by class, with the images that it is most wrong about.

python -m dnal_dist.evaluate runs/digits                                     on its validation set, into runs/digits/evaluation
python -m dnal_dist.evaluate runs/digits --shards 'data/other/*.tar' --output other
python -m dnal_dist.evaluate runs/digits/export --runtime onnx --output onnx
accelerate launch -m dnal_dist.evaluate runs/digits                          each process takes a part of the images
"""

import json
import sys
from pathlib import Path

from dnal_dist.common.door import argument, door, parser_of
from dnal_dist.common.errors import InputError, reason, remedy
from dnal_dist.common.text import percent, printable
from dnal_dist.predict import RUNTIMES

# Classes and pairs that are printed.
LISTED = 10


@door
def main() -> None:
    parser = parser_of("dnal_dist.evaluate", __doc__)
    parser.add_argument("path", type=argument, metavar="RUN|EXPORT", help="the folder of a finished run, or of an export")
    parser.add_argument("--shards", metavar="PATTERN", help="by default the recipe's data.val")
    runtime = "of an export's file, as in predict; a run is evaluated by torch if this is absent"
    parser.add_argument("--runtime", choices=RUNTIMES, help=runtime)
    parser.add_argument("--output", type=argument, metavar="FOLDER", help="by default RUN/evaluation; of an export none is written")
    parser.add_argument("--json", action="store_true", help="print what evaluation.json holds")
    args = parser.parse_args()
    from dnal_dist.export import evaluation, subject

    if args.output is not None:
        evaluation.require_own(Path(args.output))
    found = subject.opened(Path(args.path), args.runtime, args.shards)
    tally = found.tally()
    if tally is None:  # not the main process
        return
    facts = {"network": str(args.path), "shards": found.data.val, "runtime": found.runtime, **tally.facts(found.names)}
    output = args.output or (Path(args.path) / "evaluation" if found.is_run else None)
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            evaluation.write(tally, facts, Path(output))
        except OSError as error:
            raise InputError(f"{output}: cannot be written ({reason(error)}); {remedy(error)}") from None
    if output is not None and Path(output).resolve() == (Path(args.path) / "evaluation").resolve():
        _report(Path(args.path))
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)
        if output is not None:
            print(f"\n{output}/evaluation.json, confusion.png" + (", worst.png" if tally.mistakes else ""))
    if tally.skipped:
        print(f"warning: {len(tally.skipped)} images could not be used, the first: {tally.skipped[0]}", file=sys.stderr)


def _report(run: Path) -> None:
    """Write the run's report again, which shows the evaluation; only where there is one."""
    from dnal_dist.report import outputs

    if (run / "report.html").exists():
        try:
            outputs.write_all(run, draw=(run / "plots").exists())
        except (OSError, InputError) as error:
            print(f"warning: the report of {run} cannot be written again ({reason(error)})", file=sys.stderr)


def _print(facts: dict) -> None:
    print(f"top-1 {percent(facts['top1'], 2)}, top-5 {percent(facts['top5'], 2)} of {facts['images']:,} images, {facts['runtime']}")
    seen = sorted((row for row in facts["classes"] if row["images"]), key=lambda row: row["right"] / row["images"])
    print(f"\n{'weakest classes':<32}{'right':>9}{'images':>9}")
    for row in seen[:LISTED]:
        print(f"{printable(row['class'])[:30]:<32}{percent(row['right'] / row['images'], 1):>9}{row['images']:>9}")
    if facts["confused"]:
        print(f"\n{'most confused':<32}{'with':<32}{'images':>9}")
    for row in facts["confused"][:LISTED]:
        print(f"{printable(row['class'])[:30]:<32}{printable(row['with'])[:30]:<32}{row['images']:>9}")


if __name__ == "__main__":
    main()
