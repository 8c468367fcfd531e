"""Reading `federation.toml` and `site.toml`: what can be wrong before anything in them is looked at."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import did_you_mean


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds.

    Raises:
        FederationError: It is not there, cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise FederationError(f"there is no file {quoted(path)}{did_you_mean(str(path), near)}") from None
    except OSError as error:
        raise FederationError(f"cannot read {quoted(path)}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FederationError(f"cannot read {quoted(path)}: it is no TOML: {error}") from None
