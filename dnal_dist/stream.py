"""Shards in, batches out, in one global order that ranks and workers only divide.

The order of samples is a function of seed and epoch. Batch b of an epoch is a slice of that order, and a rank's part of it a slice
of the slice, so any number of ranks and workers sees the same batches and a run can go on from any of them.

python -m dnal_dist.stream --audit RUN      proves from a run's receipts that each epoch had every sample once
"""

import sys

from dnal_dist.common.door import argument, door, parser_of


@door
def main() -> None:
    parser = parser_of("dnal_dist.stream", __doc__)
    parser.add_argument("--audit", metavar="RUN", type=argument, required=True, help="check a run's receipts against its shards")
    args = parser.parse_args()
    # Torch is imported when the arguments have been parsed.
    from dnal_dist.training.audit import audit

    sys.exit(audit(args.audit))


if __name__ == "__main__":
    main()
