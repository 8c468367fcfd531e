"""The command line: `graftwork COMMAND`. Imports everything, is imported by nothing."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line with the arguments of this process."""
    from graftwork.cli.application import run

    run()
