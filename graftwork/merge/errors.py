"""Every error that a user can cause, in one tree.

    GraftworkError
    ├── RecipeError       the recipe is wrong; carries all problems at once
    ├── CheckpointError   a file or folder cannot be read as a checkpoint
    ├── MismatchError     the inputs do not fit each other
    ├── DataError         values that cannot be merged (NaN, infinities)
    ├── OutputError       the output cannot be written where it was asked for
    ├── TaskError         a Task cannot be loaded or does not fit a checkpoint
    └── DependencyError   an optional package is missing

A message says what was being done, what is wrong with both values, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class GraftworkError(Exception):
    """Anything that a user can put right; the command line prints it as one line per problem."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems, one line each."""
        return tuple(str(argument) for argument in self.args)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class RecipeError(GraftworkError):
    """The recipe is wrong. Carries every problem found, each with its key path."""

    def __init__(self, problems: Sequence[str] | str) -> None:
        super().__init__(*([problems] if isinstance(problems, str) else problems))


class CheckpointError(GraftworkError):
    """A file or folder cannot be read as a checkpoint."""


class MismatchError(GraftworkError):
    """The inputs do not fit each other. Carries every problem found."""


class DataError(GraftworkError):
    """An input holds values that cannot be merged."""


class OutputError(GraftworkError):
    """The output cannot be written where it was asked for."""


class TaskError(GraftworkError):
    """A Task cannot be loaded, or its module does not fit a checkpoint."""


class DependencyError(GraftworkError):
    """An optional package is missing."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "known"?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""
