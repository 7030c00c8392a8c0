"""The subcommands of `mlsys`: one module each, imported only when it is the one asked for.

Each has `configure(parser)`, which adds its arguments, and `run(args) -> int`, the exit status.
A problem with what the user typed is raised as `UsageError`; `mlsys.cli` prints it on one line.
"""


class UsageError(Exception):
    """What the user asked for cannot be done: the message names the value and the remedy."""
