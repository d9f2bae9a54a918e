"""The start of the command: every error becomes one line and an exit status here, and only here."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (llama3.py comes here first, whatever runs it)
    found = "{}.{}".format(*sys.version_info[:2])
    sys.stderr.write("llama3.py: error: this is Python " + found + ", expected 3.11 or newer\n")
    sys.exit(2)

try:
    import os
    import warnings
    from collections.abc import Sequence
    from contextlib import suppress

    from cli import ranks
    from cli.chat import talk
    from cli.complete import complete
    from cli.messages import UsageError, note
    from cli.options import parse_arguments
    from cli.score import score
    from formats.errors import CheckpointError, one_line, out_of_memory
except KeyboardInterrupt:  # while PyTorch is imported
    sys.exit(130)


def run(argv: Sequence[str] | None) -> int:
    """Do what the options ask for; returns the exit status. Raises CheckpointError, UsageError."""
    ranks.meet()
    args = parse_arguments(argv)
    if sys.stdout is None:
        raise UsageError("standard output is closed, so there is nowhere to write to")
    return talk(args) if args.chat else complete(args) if args.score is None else score(args)


def status_of(argv: Sequence[str] | None, voice: object) -> int:
    """Run, and say in one line what went wrong, with a voice if only this rank knows it."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(message)
            return run(argv)
    except (CheckpointError, UsageError, FloatingPointError) as error:
        sys.stderr = sys.stderr if ranks.n_ranks() > 1 else voice  # until they meet, each speaks
        note(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if ranks.lost_connection(error):  # it has said why
            note(f"another rank exited ({one_line(error, limit=100)})")
            return 2 if ranks.this_rank() == 0 else 0
        sys.stderr = voice
        if not out_of_memory(error):
            raise
        where = f"rank {ranks.this_rank()}: " * (ranks.n_ranks() > 1)
        reason = f"out of memory ({one_line(error)}); use a shorter prompt or a smaller model"
        note(f"error: {where}{reason}")
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 if the input was bad."""
    voice = sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (it may be closed)
    if ranks.in_environment("RANK", 0) > 0 and ranks.in_environment("WORLD_SIZE", 1) > 1:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    status = 1
    try:
        status = status_of(argv, voice)
    except Exception:
        if ranks.n_ranks() == 1:
            raise
        sys.excepthook(*sys.exc_info())
    if ranks.n_ranks() > 1:  # others may be in a computation that never ends, and are left at once
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)
    return status
