"""Export the compact network of a run: files that load without this project, each compared with it in a process of its own.

python -m dnal_dist.export runs/digits                          model.safetensors + model.py, model.pt2, model.onnx
python -m dnal_dist.export runs/digits --to onnx,openvino
python -m dnal_dist.export runs/digits --hub my-model           beside it, the folder of a model hub's repository

Exit codes: 0 exported and proven, 2 wrong input, 3 a file is not the network of the run (nothing is left of it).
"""

import json
import sys

from dnal_dist.common.door import among, argument, door, parser_of, several, whole
from dnal_dist.common.text import short

KINDS = ("pt2", "onnx", "openvino", "executorch")
# As of training that missed its target.
UNPROVEN = 3


def _kinds(text: str) -> list[str]:
    return several(among(KINDS))(text) if text else []


def _images(text: str) -> int | None:
    return None if text == "all" else whole()(text)


@door
def main() -> None:
    parser = parser_of("dnal_dist.export", __doc__)
    parser.add_argument("run", type=argument, metavar="RUN", help="the folder of a finished run")
    kinds = "pt2,onnx (default), openvino, executorch"
    parser.add_argument("--to", type=_kinds, default=["pt2", "onnx"], metavar="KINDS", help=kinds)
    parser.add_argument("--fold-bn", action="store_true", help="BatchNorm becomes part of the convolutions (model.onnx: always)")
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX; by default what torch writes")
    parser.add_argument("--any-size", action="store_true", help="height and width are free too, if the network allows it")
    images = "validation images that the files are compared on (1000)"
    parser.add_argument("--images", type=_images, default=1000, metavar="N|all", help=images)
    parser.add_argument("--hub", type=argument, metavar="FOLDER", help="a new folder with config.json, weights, code and card")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    args = parser.parse_args()
    from rich.console import Console

    from dnal_dist.export import proof
    from dnal_dist.export.command import Options, export

    options = Options(args.to, args.fold_bn, args.opset, args.any_size, args.images, args.hub)
    try:
        with Console(stderr=True).status("") as status:
            manifest = export(args.run, options, status.update)
    except proof.ProofError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UNPROVEN)
    for note in manifest["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps(manifest, indent=1))
        return
    for name, facts in manifest["files"].items():
        print(f"{name:<20}{short(facts['bytes']):>10}")
    print()
    for check in manifest["proof"]["checks"]:
        same = f"same class for all {check['images']} images" if not check["top1_differs"] else f"{check['top1_differs']} differ"
        print(f"{check['file']:<16}{check['precision']}  differs by {check['difference']:.0e} of the largest logit, {same}")
    print(f"\n{args.run / 'export'}")


if __name__ == "__main__":
    main()
