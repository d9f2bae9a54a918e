"""Output: notes on standard error, text on standard output, progress, statistics."""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from formats.errors import CONTROL_CHARACTERS, give_up, one_line, say


class UsageError(ValueError):
    """A request that cannot be fulfilled: one line that says why, and what to do."""


class OutputError(UsageError):
    """Standard output cannot be written."""


def note(message: object) -> None:
    """Tell the user something on standard error."""
    say(f"llama3.py: {one_line(message, limit=1000)}")


def stream(texts: Iterable[str]) -> bool:
    """Write `texts` to standard output as they come, and nothing else; whether someone reads it.

    On a terminal a line break comes last. Raises OutputError if standard output cannot be written.
    """
    out = sys.stdout
    if hasattr(out, "reconfigure"):  # a notebook's has no encoding to change
        out.reconfigure(encoding="utf-8", newline="\n")
    terminal, text = out.isatty(), ""
    try:
        for text in texts:
            out.write(text.translate(CONTROL_CHARACTERS) if terminal else text)
            out.flush()
    except OSError as error:
        give_up(out)
        if not isinstance(error, BrokenPipeError):  # the reader has enough
            raise OutputError(f"standard output cannot be written: {error.strerror}") from None
        return False
    finally:
        if terminal and not text.endswith("\n"):
            print(flush=True)
    return True


def bar(what: str, unit: str, delay: float) -> Callable[[Iterable], Iterable]:
    """A progress bar on a terminal for what takes longer than `delay` seconds."""
    return functools.partial(tqdm, desc=what, unit=unit, delay=delay, leave=False, disable=None)


def timed(items: Iterable, times: list[float]) -> Iterator:
    """`items`, with the time at which each came added to `times`."""
    for item in items:
        times.append(time.perf_counter())
        yield item


def peak_rss_bytes() -> int | None:
    """The most memory that this process has had resident so far; None where it cannot be told."""
    with suppress(OSError, IndexError):  # Linux: getrusage also counts what the parent had
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    with suppress(ImportError):  # Windows has none
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return None


def steps_stats(prompt_tokens: int, times: list[float]) -> dict[str, float]:
    """Return the --stats of a generation; `times`: of the start, then of every token."""
    ends = times if len(times) > 1 else [*times, time.perf_counter()]  # or not one token came
    return {
        "prompt_tokens": prompt_tokens,
        "prefill_s": round(ends[1] - ends[0], 4),
        "decode_tokens": len(ends) - 2,
        "decode_s": round(ends[-1] - ends[1], 4),
    }


def say_stats(load_s: float, stats: dict[str, float], device: torch.device, whole: bool) -> None:
    """Write the line of --stats; of several ranks that all came to the end, the largest values."""
    from cli import ranks

    stats = {"load_s": round(load_s, 4)} | stats | {"peak_rss_bytes": peak_rss_bytes()}
    if device.type == "cuda":
        stats["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    found = ranks.gathered(stats) if whole else [stats]
    say(json.dumps({key: max((s[key] for s in found), key=lambda n: n or 0) for key in stats}))
