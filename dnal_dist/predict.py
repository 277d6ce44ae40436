"""What an exported network sees in images: the first classes and their probabilities.

python -m dnal_dist.predict runs/digits/export one.png another.jpg
python -m dnal_dist.predict runs/digits/export *.png --runtime pt2 --json
"""

import json
import sys
from pathlib import Path

from dnal_dist.common.door import argument, door, parser_of
from dnal_dist.common.text import percent, printable

RUNTIMES = ("onnx", "openvino", "executorch", "pt2", "torch")


@door
def main() -> None:
    parser = parser_of("dnal_dist.predict", __doc__)
    parser.add_argument("export", type=argument, metavar="EXPORT", help="the folder of an export, or of a run that has one")
    parser.add_argument("images", type=argument, nargs="+", metavar="IMAGE", help="files: JPEG, PNG, WebP, BMP, TIFF")
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help="by default onnx or openvino, if the export has its file and it is installed; torch runs the program model.py, "
        "and pt2 may run one that is hidden in model.pt2: only for exports of your own",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to print (5)")
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    args = parser.parse_args()
    from dnal_dist.export import prediction

    model = prediction.Model(Path(args.export), args.runtime)
    found = [prediction.predicted(model, path, max(1, args.top)) for path in args.images]
    if args.json:
        print(json.dumps(found, indent=1))
    for one in found if not args.json else ():
        words = one.get("error") or "  ".join(f"{row['class']} {percent(row['probability'])}" for row in one["classes"])
        print(f"{one['image']}: {printable(words)}")
    if failed := sum("error" in one for one in found):
        print(f"error: {failed} of {len(found)} images cannot be read", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
