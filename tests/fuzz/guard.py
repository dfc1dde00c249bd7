"""What must hold whatever is in a file: a result, or a ValueError that names the file; in time, in little memory, and
without a trace: no file written, nothing run, nothing unpickled but plain values, nobody asked on the network."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 5.0  # of CPU time
BYTES = 2**30
REPOSITORY = Path(__file__).parents[2]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = re.compile(
    r"pickle\.find_class|subprocess\.Popen|os\.(system|exec|posix_spawn|fork|forkpty|startfile|remove|rename|rmdir|mkdir|"
    r"link|symlink|truncate|chmod)|shutil\..*|socket\.(connect|getaddrinfo|bind|sendto)|ctypes\.dlopen"
)


class Outcome(NamedTuple):
    """kind: what happened in short, without what differs from file to file; place: where in our code."""

    kind: str
    place: str
    finding: str = ""


class TooSlow(BaseException):
    """Not to be caught by anyone who catches whatever a parser may raise."""


class Guard:
    """Runs functions under guard. There is one for a process: a hook of the interpreter cannot be taken away."""

    def __init__(self) -> None:
        self._traces: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._traces is None:
            return
        if event == "open":
            path, _, flags = arguments
            here = isinstance(path, int) or path == os.devnull  # an int is a file that is open already
            if isinstance(flags, int) and flags & WRITES and not here:
                self._traces.append(f"opened {path!r} for writing")
        elif FORBIDDEN.fullmatch(event):
            self._traces.append(f"{event} {arguments!r:.200}")

    def run(self, function: Callable[[], Any], file: str) -> Outcome:
        """Call `function`, which reads a file of that name."""
        self._traces, before, start, error = [], _reset_peak(), time.process_time(), None
        try:
            with _limit(SECONDS):
                function()
        except (Exception, TooSlow) as raised:
            error = raised
        except BaseException as raised:  # Rust's panics are no Exception
            if isinstance(raised, (KeyboardInterrupt, SystemExit)):
                raise
            error = raised
        finally:
            traces, self._traces = self._traces, None
        seconds, peak = time.process_time() - start, _status("VmHWM") - before
        place = _place(error)
        if traces:
            return Outcome("trace", place, f"left traces: {'; '.join(traces[:3])}")
        if seconds > SECONDS:
            return Outcome("slow", place, f"took {seconds:.1f} s\n{_text(error)}")
        if peak > BYTES:
            return Outcome("large", place, f"took {peak / 2**20:.0f} MiB\n{_text(error)}")
        if error is None:
            return Outcome("result", "")
        if not isinstance(error, ValueError):
            return Outcome(type(error).__name__, place, _text(error))
        if file not in str(error):
            return Outcome("unnamed", place, f"does not name {file}\n{_text(error)}")
        return Outcome(re.sub(r"\d+|'[^']*'|\([^)]*\)", "#", str(error).replace(file, ""))[:120], place)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds + 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _status(name: str) -> int:
    """Bytes, as /proc says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _place(error: BaseException | None) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    own = [f for f in frames if Path(f.filename).is_relative_to(REPOSITORY) and "/tests/" not in f.filename]
    return f"{Path(own[-1].filename).relative_to(REPOSITORY)}:{own[-1].lineno}" if own else ""


def _text(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error))[-3000:] if error else ""
