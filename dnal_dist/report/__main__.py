"""Reports of runs, finished, stopped or still going, from their folders alone: no torch, no network.

python -m dnal_dist.report RUN            write RUN/report.html, RUN/report.md and RUN/plots/, and print the run's final table
python -m dnal_dist.report RUN RUN ...    compare runs, or those of a sweep's folder: mean and standard deviation over seeds
"""

from dnal_dist.common.door import argument, door, parser_of
from dnal_dist.common.errors import InputError
from dnal_dist.report import comparison
from dnal_dist.report.outputs import compare, print_table, write_all
from dnal_dist.report.records import load


@door
def main() -> None:
    parser = parser_of("dnal_dist.report", __doc__)
    help_ = "run folder, for example runs/digits, or a sweep's, which holds runs"
    parser.add_argument("run", nargs="+", type=argument, metavar="RUN", help=help_)
    parser.add_argument("--output", type=argument, metavar="FOLDER", help="where a comparison goes; default: near all its runs")
    args = parser.parse_args()
    try:
        if len(args.run) > 1 or comparison.is_sweep(args.run[0]):
            compare(args.run, args.output)
        elif args.output:
            raise InputError("--output: goes with a comparison of runs; a single run's report is written into its own folder")
        else:
            run = load(args.run[0])
            write_all(run)
            print_table(run)
    except OSError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    main()
