"""The `mlsys` command: finds the subcommand asked for, imports only that, and reports problems on one line.

Nothing heavy is imported here, so that `mlsys --help` answers at once.

See also:
    `mlsys.commands` (what a subcommand's module must have).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mlsys.commands import UsageError

COMMANDS = {
    "list": "every technique: one line, paper, backends and what can run here",
    "show": "a technique's idea, contract, files and backends",
    "check": "run a technique's contract on an implementation, yours or the library's",
    "bench": "time techniques beside the reference and the production peer",
    "cuda": "run, check or profile a CUDA kernel file on this machine, without a GPU",
    "search": "search the documentation of the Python you run (retrieval.bm25 at work)",
    "cost": "what training, serving or an all-reduce should cost, every formula with its numbers",
    "schedule": "a pipeline schedule's timeline, bubble and memory, the library's or your own",
    "tune": "find the fastest settings of the Triton kernels on this GPU, once",
    "roofline": "place measured records under the roof of their machine, or of a published one",
    "train": "train a small transformer on your Python's own source, and sample from it",
    "claims": "published numbers that the library reproduces",
    "docs": "write measured tables and generated pages into the documentation",
}

EXAMPLES = """examples:
  mlsys list                                        what there is
  mlsys show attention.flash                        what it is, and where
  mlsys check attention.flash my.py:my_flash        is mine right?
  mlsys bench attention.flash --impl my.py:my_flash how fast is it?
  mlsys search "parse a date string"
  mlsys cost train --model gpt3 --gpus 1024 --tp 8 --pp 16
  mlsys train --minutes 1
  mlsys COMMAND --help                              all about one command
"""

# What goes wrong for a reason that the user can do something about is one line; any other exception is a bug of ours
# and shows its traceback. Some kinds may be either: where it is not our code that raised one, the line says how to see.
EXPECTED = (UsageError, ValueError, TypeError, LookupError, OSError, ImportError)
DOUBTFUL = (ValueError, TypeError, LookupError)
OURS = ("mlsys", "mlsys_benchmarks")  # how our modules' names begin


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UsageError`s: one line, like every other."""

    def error(self, message: str) -> NoReturn:
        """Instead of printing the whole usage and exiting."""
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or what the subcommand returns; 2 for a bad request."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # known before anything can go wrong; the parsers accept it anywhere
    try:
        status = _run(arguments)
        sys.stdout.flush()  # so that a closed pipe shows here and not while Python shuts down
    except BrokenPipeError:  # `mlsys list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a command that ended by SIGPIPE
    except KeyboardInterrupt:
        if debug:
            raise
        print("mlsys: interrupted", file=sys.stderr)
        return 130
    except EXPECTED as error:
        if debug:
            raise
        hint = "; `--debug` shows where" if isinstance(error, DOUBTFUL) and not deliberate(error) else ""
        print(f"mlsys: {message(error)}{hint}", file=sys.stderr)
        return 2
    return status


def message(error: BaseException) -> str:
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("mlsys"):
        text += "; `pip install 'mlsys-reference[bench]'` has what the benchmarks need"
    return text


def deliberate(error: BaseException) -> bool:
    """Whether a `raise` of ours brought it up, and not an expression that failed or somebody else's code."""
    import dis

    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    module = last.tb_frame.f_globals.get("__name__", "")
    code = last.tb_frame.f_code.co_code
    return module.partition(".")[0] in OURS and dis.opname[code[last.tb_lasti]] == "RAISE_VARARGS"


def _run(arguments: list[str]) -> int:
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    if asked is not None and asked not in COMMANDS:
        from mlsys.catalog import nearest

        near = nearest(asked, COMMANDS)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UsageError(f"no command {asked!r}; {remedy}")

    parser = build(asked)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = f"mlsys {asked}" if asked else "mlsys"
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; see `{command} --help`")
    if args.command is None:
        parser.print_help()
        return 2
    status: int = importlib.import_module(f"mlsys.commands.{args.command}").run(args)
    return status


def build(asked: str | None) -> Parser:
    """The parser, with the arguments of the subcommand that is asked for; of the others only their line of help."""
    everywhere = Parser(add_help=False)
    everywhere.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of a problem"
    )
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="mlsys",
        description="Readable reference implementations of ML-systems techniques, checked and measured.",
        epilog=EXAMPLES,
        formatter_class=style,
        parents=[everywhere],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line, formatter_class=style, parents=[everywhere])
        if name == asked:
            importlib.import_module(f"mlsys.commands.{name}").configure(command)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: that reads the installed distribution's metadata."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import mlsys

        print(f"mlsys {mlsys.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
