"""What a user reads when something is wrong: one line per problem on stderr, and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import typer

USER_ERROR = 1
USAGE_ERROR = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

_MOST_PROBLEMS = 50


class Terminated(KeyboardInterrupt):
    """SIGTERM: the library sees it as the interruption that it is."""


def tell(line: str) -> None:
    """Write one line to stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(" ".join(line.splitlines()), file=sys.stderr, flush=True)


def usage_error(line: str) -> typer.Exit:
    """Say what is wrong with the arguments; return the exception to raise."""
    tell(f"error: {line}")
    return typer.Exit(USAGE_ERROR)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors that a user can put right into lines on stderr and an exit code; a bug keeps its traceback."""
    from graftwork.merge.errors import GraftworkError

    signals: list[int] = []
    with _terminations_as_interrupts(signals):
        try:
            yield
            # Here a reader that has gone away is an exception; on the interpreter's way out it would be noise.
            sys.stdout.flush()
        except GraftworkError as error:
            problems = error.problems or (str(error),)
            for problem in problems[:_MOST_PROBLEMS]:
                tell(f"error: {problem}")
            if len(problems) > _MOST_PROBLEMS:
                tell(f"error: and {len(problems) - _MOST_PROBLEMS} more problems")
            raise typer.Exit(USER_ERROR) from None
        except KeyboardInterrupt:
            tell("stopped")
            raise typer.Exit(_interrupted(signals)) from None
        except BrokenPipeError:
            # Whoever read our output has enough of it. Python must not try to flush the rest on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(USER_ERROR) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            tell(f"error: {where}{error.strerror or error}")
            raise typer.Exit(USER_ERROR) from None
        except MemoryError:
            tell("error: there is not enough memory; try fewer --threads")
            raise typer.Exit(USER_ERROR) from None
        except Exception as error:
            # By name, because the engine must not be imported for commands that do not merge.
            if not _is_stopped_run(error):
                raise
            tell(str(error))
            raise typer.Exit(_interrupted(signals)) from None


def _is_stopped_run(error: Exception) -> bool:
    module = sys.modules.get("graftwork.merge.run")
    return module is not None and isinstance(error, module.Interrupted)


def _interrupted(signals: list[int]) -> int:
    return 128 + signals[-1] if signals else INTERRUPTED


@contextlib.contextmanager
def _terminations_as_interrupts(signals: list[int]) -> Iterator[None]:
    """Raise `Terminated` in the main thread on SIGTERM, and note the signal."""

    def terminate(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread, as in some tests
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
