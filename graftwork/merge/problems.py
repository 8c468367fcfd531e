"""Collects what is wrong with a recipe, one short line for each problem."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graftwork.merge.errors import RecipeError

_LONGEST_LINE = 390
_MOST_LINES = 100


class Problem:
    """One line of a report, which may hold for several places."""

    __slots__ = ("more", "path", "text")

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text, self.more = path, text, 0

    def __str__(self) -> str:
        also = (
            f" (and in {self.more} more places)" if self.more > 1 else " (and in one more place)" if self.more else ""
        )
        line = printable(f"{self.path}: {self.text}")
        room = _LONGEST_LINE - len(also)
        return (line if len(line) <= room else line[: room - 1] + "…") + also


class Report:
    """Collects the problems and warnings of one document.

    Args:
        prefix: Stands before every key path, to tell documents apart.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.problems: list[Problem] = []
        self._once: dict[str, Problem] = {}
        self._warnings: dict[str, Problem] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings, one line each."""
        return tuple(str(warning) for warning in list(self._warnings.values())[:_MOST_LINES])

    def problem(self, path: str, text: str, *, once: str | None = None) -> None:
        """Add a problem.

        Args:
            path: The key path it is about.
            text: What is wrong, both values, what to do.
            once: Problems with the same word here are shown as one, with the number of places.
        """
        if once is not None and once in self._once:
            self._once[once].more += 1
            return
        self.problems.append(Problem(self.prefix + path, text))
        if once is not None:
            self._once[once] = self.problems[-1]

    def warn(self, path: str, text: str, *, once: str | None = None) -> None:
        """Add a warning; see `problem`."""
        key = once or f"{path}: {text}"
        if key in self._warnings:
            self._warnings[key].more += 1
        else:
            self._warnings[key] = Problem(self.prefix + path, text)


def raise_problems(reports: Iterable[Report]) -> None:
    """Raise all problems together, if there is one.

    Raises:
        RecipeError: There is a problem.
    """
    lines = list(dict.fromkeys(str(problem) for report in reports for problem in report.problems))
    if len(lines) > _MOST_LINES:
        lines = [*lines[:_MOST_LINES], f"recipe: and {len(lines) - _MOST_LINES} more problems"]
    if lines:
        raise RecipeError(lines)


def nearest_key(word: str, known: Iterable[str]) -> str | None:
    """Return the known key of which `word` is a misspelling, or None.

    A misspelling is at most two edits away, and at most one per three letters of the known key: `tol` is none of `t`.
    """
    lowered = word.lower()
    best: tuple[int, str] | None = None
    for key in known:
        allowed = min(2, len(key) // 3)
        if lowered == key:
            return key
        # Letters that only one of them has cost an edit each, which spares most words the full comparison.
        if abs(len(lowered) - len(key)) <= allowed and len(set(key) - set(lowered)) <= allowed:
            distance = _edits(lowered, key)
            if distance <= allowed and (best is None or distance < best[0]):
                best = (distance, key)
    return best[1] if best else None


def show(value: object, width: int = 60) -> str:
    """Return a value as one short line, for a message."""
    if isinstance(value, Mapping):
        text = "a mapping"
    elif isinstance(value, list | tuple):
        text = "a list"
    elif value is None:
        text = "nothing (null)"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, str):
        text = f'"{printable(value[:width])}"'
        if len(text) > width:
            text = f'{text[: width - 2]}…"'
    else:
        text = printable(str(value))[:width]
    return text


def printable(text: str) -> str:
    """Return `text` with everything that is not printable written as an escape."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def join(path: str, key: str) -> str:
    """Return the key path of `key` below `path`."""
    if len(key) > 40:
        key = key[:39] + "…"
    key = printable(key)
    return f"{path}.{key}" if path else key


def spoken(words: Iterable[str]) -> str:
    """Return words as `a, b and c`; of more than six, the first five."""
    listed = list(words)
    if len(listed) > 6:
        listed = [*listed[:5], "…"]
    return " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]])) if listed else ""


def _edits(first: str, second: str) -> int:
    """Return how many insertions, deletions, replacements and swaps of neighbours turn one word into the other."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        following = [i]
        for j, other in enumerate(second, start=1):
            cost = min(row[j] + 1, following[j - 1] + 1, row[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            following.append(cost)
        before, row = row, following
    return row[-1]
