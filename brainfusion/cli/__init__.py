"""The command line: `brainfusion COMMAND`, and what the scripts call."""

import os
import re
import sys
from importlib import import_module
from pathlib import Path

from brainfusion.runtime import threads
from brainfusion.runtime.errors import UserError
from brainfusion.runtime.logs import complain, say

COMMANDS = {
    "demo": "run every stage on a simulated cohort and write a report",
    "simulate": "make a simulated cohort with a planted (or no) link",
    "import": "make a cohort from recordings, or add DNA embeddings to one",
    "extract": "make DNA embeddings of personal sequences with a model that you have",
    "pretrain": "train a brain encoder on a cohort's recordings",
    "embed": "turn recordings into features with a trained encoder",
    "align": "train the shared space of brain features and DNA embeddings",
    "finetune": "train a brain encoder further, in the graph of an alignment",
    "retrieve": "score cross-modal retrieval, or ask for the nearest people",
    "probe": "predict phenotypes from features and from embeddings",
    "attribute": "measure which genes, networks and parcels retrieval rests on",
    "power": "tell what a study of n people can find, before it is done",
    "audit": "check that every table belongs to the people it is joined to",
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
        complain(f"unknown command '{command}'. {nearest(command, COMMANDS)}")
        return 2
    threads.set_environment()
    module = import_module(
        f"brainfusion.cli.{command}_" if command == "import" else f"brainfusion.cli.{command}"
    )
    try:
        return module.main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        complain(str(error))
    except BrokenPipeError:
        # The reader has left, as `| head` does; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # Disks fill up, folders are read-only, files vanish: the system's words name the file.
        complain(
            f"{error.strerror or error}{_place(error)}. Check that the path exists, is writable "
            "and has space."
        )
    except _native_errors() as error:
        if (words := _system_words(str(error))) is None:
            raise
        complain(words)
    except KeyboardInterrupt:
        say("interrupted.")
        return 130
    return 2


def _place(error: OSError) -> str:
    """Where it happened; of a file that is written aside, its folder."""
    name = error.filename2 or error.filename
    if name is None:
        return ""
    path = Path(os.fsdecode(name))
    return f": {path.parent if path.name.startswith('.') else path}"


def _native_errors() -> tuple[type[Exception], ...]:
    """What polars, safetensors and torch make of a disk or a process that fails.

    They are loaded by whoever raises them, so this is looked up only when something went wrong.
    """
    from polars.exceptions import PolarsError
    from safetensors import SafetensorError

    return PolarsError, SafetensorError, RuntimeError


def _system_words(text: str) -> str | None:
    """What happened, if the error is the system's and no bug of ours."""
    if found := re.search(r"os error (\d+)|inline_container", text):
        reason = os.strerror(int(found[1])) if found[1] else "Write failed"
        return f"{reason}: a file could not be written. Free space, or give another folder."
    if re.search(r"Connection (closed|reset) by peer", text):
        return "another process of this run stopped; its own message says why."
    return None


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
