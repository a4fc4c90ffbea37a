"""The command line: `python -m mas_fast demo`, `report` and `doctor`."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command that the arguments name and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m mas_fast", description="Exact per-sample parameter importance.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser("demo", help="fine-tuning, MAS and joint training on handwritten digits")
    commands.add_parser("doctor", help="what runs on this machine, and why the alternatives do not")
    report_parser = commands.add_parser("report", help="one HTML page from the results of benchmarks.continual")
    # Each command imports only what it needs: the doctor must answer where the demo's libraries are missing.
    if argv[:1] == ["demo"]:
        from mas_fast import demo

        demo.add_arguments(demo_parser)
        return demo.main(parser.parse_args(argv))

    if argv[:1] == ["report"]:
        from mas_fast import report

        report.add_arguments(report_parser)
        return report.main(parser.parse_args(argv))

    parser.parse_args(argv)
    from mas_fast import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
