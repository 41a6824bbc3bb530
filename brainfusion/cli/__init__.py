"""The command line: `brainfusion COMMAND`, and what the scripts call."""

import sys
from importlib import import_module

from brainfusion.runtime import threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import say

COMMANDS = {
    "demo": "run every stage on a simulated cohort and write a report",
    "simulate": "make a simulated cohort with a planted (or no) link",
    "import": "make a cohort from recordings, or add DNA embeddings to one",
    "pretrain": "train a brain encoder on a cohort's recordings",
    "embed": "turn recordings into features with a trained encoder",
    "align": "train the shared space of brain features and DNA embeddings",
    "retrieve": "score cross-modal retrieval, or ask for the nearest people",
    "probe": "predict phenotypes from features and from embeddings",
    "report": "draw a workspace's results as one HTML page",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from brainfusion import __version__

        print(__version__)
        return 0
    return run(argv[0], argv[1:])


def run(command: str, argv: list[str] | None = None) -> int:
    """Run `command` with `argv`; an error that the user can mend is one line and exit code 2."""
    from brainfusion.runtime.errors import nearest

    if command not in COMMANDS:
        say(f"error: unknown command '{command}'. {nearest(command, COMMANDS)}")
        return 2
    threads.set_environment()
    module = import_module(
        f"brainfusion.cli.{command}_" if command == "import" else f"brainfusion.cli.{command}"
    )
    try:
        return module.main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        say(f"error: {error}")
    except OSError as error:
        # Disks fill up, folders are read-only, files vanish: the system's words name the file.
        say(
            f"error: {error.strerror or error}: {error.filename or 'no file named'}. "
            "Check that the path exists, is writable and has space."
        )
    except KeyboardInterrupt:
        say("interrupted.")
        return 130
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: brainfusion COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "brainfusion COMMAND --help explains a command. Without --cohort, commands use the",
            "demo cohort, which is simulated on first use.",
        ]
    )
