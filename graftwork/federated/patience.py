"""Flower's SuperNode, with more time for its clients to start: `python -m graftwork.federated.patience ARGUMENTS…`.

For each message a SuperNode starts a process, which has 30 seconds for its first sign of life (flwr 1.41). Python and
Flower alone take two seconds of a processor, so on a machine that is busy, or reads from a slow disk, the process comes
too late and is given up; another one is started, and the machine has even more to do. Here it has two minutes. From
then on Flower's own limits hold.

The hook is not public: where a release of Flower lacks it, its own limit stays.
"""

from __future__ import annotations

import datetime
import sys
from typing import Any

START_SECONDS = 120.0
"""What a client process has for its first sign of life."""


def be_patient(state: Any, seconds: float = START_SECONDS) -> bool:
    """Let a class of Flower's node states wait longer for clients to start; return whether it can be done.

    Args:
        state: `InMemoryCoreState`.
        seconds: How long in all.
    """
    plain = getattr(state, "claim_task", None)
    if plain is None:
        return False

    def claim_task(self: Any, task_id: int) -> Any:
        token = plain(self, task_id)
        record = getattr(self, "task_token_store", {}).get(task_id)
        until = getattr(record, "active_until", None)
        if record is not None and token is not None and isinstance(until, datetime.datetime):
            now = datetime.datetime.now(until.tzinfo)
            record.active_until = max(until, now + datetime.timedelta(seconds=seconds))
        return token

    state.claim_task = claim_task
    return True


def main() -> None:
    """Run Flower's SuperNode with the arguments of this process."""
    from flwr.supercore.corestate import in_memory_corestate
    from flwr.supernode.cli.flower_supernode import flower_supernode

    be_patient(getattr(in_memory_corestate, "InMemoryCoreState", object()))
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
