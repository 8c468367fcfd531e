"""What a run tells while it goes on, as one JSON object per line.

The runtime reports through Python's `logging`, under the name `graftwork.federated`; nothing is shown until somebody
asks for it. `json_lines` shows it: `{"time": …, "level": "warning", "event": "site_lost", "round": 3, "site": "oslo"}`.

| event | level | fields |
|---|---|---|
| `run_started` | info | algorithm, rounds, sites, resumed_after |
| `site_lost` | warning | round, site, reason: its process or connection ended |
| `site_asked_again` | warning | round, site, attempt |
| `site_failed` | warning | round, site, reason: what it gave is not used |
| `site_moved` | info | site: its node is back under another number |
| `round_finished` | info | round, asked, answered, accuracy, train_loss, seconds, bytes |
| `round_skipped` | warning | round, reason |
| `run_finished` | info | rounds, accuracy |
| `note` | info | text: what `graftwork serve` has to say besides |

Reasons are those of the run's record: one line, cut off at `messages.LONGEST_REASON` characters, control characters
taken out. Settings, keys and environment are never written.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

LOGGER = logging.getLogger("graftwork.federated")
LOGGER.addHandler(logging.NullHandler())


def tell(event: str, /, **fields: object) -> None:
    """Report an event; fields that are None are left out."""
    _log(logging.INFO, event, fields)


def warn(event: str, /, **fields: object) -> None:
    """Report an event that somebody should look at."""
    _log(logging.WARNING, event, fields)


def tell_round(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
    """Report a round that is over: its line of `metrics.jsonl`, and its seconds."""
    again = {"asked_again": timing["asked_again"]} if timing.get("asked_again") else {}
    seconds = round(float(timing["seconds"]), 3) if "seconds" in timing else None
    if "skipped" in line:
        warn("round_skipped", round=line["round"], reason=line["skipped"])
    else:
        tell("round_finished", **{key: line.get(key) for key in _OF_A_ROUND}, seconds=seconds, **again)


_OF_A_ROUND = ("round", "asked", "answered", "train_loss", "accuracy", "epsilon", "bytes")


def _log(level: int, event: str, fields: Mapping[str, object]) -> None:
    if LOGGER.isEnabledFor(level):
        held = {key: value for key, value in fields.items() if value is not None}
        LOGGER.log(level, "%s", event, extra={"graftwork": {"event": event, **held}})


class JsonFormatter(logging.Formatter):
    """Makes one line of JSON of a record, with its time in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        from graftwork.federated.runs import plain

        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        fields = getattr(record, "graftwork", None)
        if not isinstance(fields, dict):
            fields = {"event": "message", "text": record.getMessage()}
        line = {"time": time, "level": record.levelname.lower(), **fields}
        return json.dumps(plain(line), ensure_ascii=False, separators=(",", ":"), default=str)


@contextlib.contextmanager
def json_lines(stream: TextIO | None = None) -> Iterator[None]:
    """Write all events inside to a stream, by default stderr."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter())
    before = LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
