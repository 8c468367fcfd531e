"""Flower's client process, pinned to graftwork's own client: `python -m graftwork.federated.pinned`.

A SuperLink ships an app to its SuperNodes, and the app names the code that a client runs. So whoever can submit a run
could run anything on every site. A site that joined with `graftwork join` starts this module wherever Flower wants
`flwr-clientapp`: what was shipped is read as data, is never unpacked, and nothing in it is ever imported. The client
is always `graftwork.federated.client_app`; an app that brings code or names another client is refused.
"""

from __future__ import annotations

import io
import os
import sys
import tomllib
import zipfile
from typing import Any

from graftwork.federated.errors import FederationError

CLIENT = "graftwork.federated.client_app:app"

PATH_VARIABLE = "GRAFTWORK_SITE_PATH"
"""Where the real search path of programs waits, while Flower's own programs see only what they may start."""

_CODE = (".py", ".pyc", ".pyo", ".so", ".pyd", ".pth", ".sh")


def refuse_foreign_code(content: bytes) -> None:
    """Raise if a shipped app (FAB) holds code or names another client.

    Raises:
        FederationError: It does, or it cannot be read.
    """
    from graftwork.merge.checkpoint import listed, quoted  # not above: a client that is slow to start is given up

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            code = [name for name in archive.namelist() if name.lower().endswith(_CODE)]
            said = tomllib.loads(archive.read("pyproject.toml").decode("utf-8"))
        client = said["tool"]["flwr"]["app"]["components"].get("clientapp")
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise FederationError(f"this site cannot read the app that the server sent: {error}") from None
    if code:
        raise FederationError(
            f"this site runs graftwork's own client only; the app that the server sent brings code: {listed(code, 3)}"
        )
    if client != CLIENT:
        raise FederationError(
            f"this site runs graftwork's own client only; the app that the server sent names {quoted(client)}"
        )


def pin(module: Any) -> None:
    """Let Flower's module that runs a client use graftwork's own, whatever was shipped.

    Raises:
        FederationError: The module is not what it was in the releases that this was written for.
    """
    lacking = [name for name in ("install_from_fab", "get_load_client_app_fn") if not hasattr(module, name)]
    if lacking:
        names = ", ".join(lacking)
        raise FederationError(f"cannot pin the client with this release of Flower: it has no {names}")

    def install(content: bytes, *arguments: Any, **more: Any) -> None:
        refuse_foreign_code(content)

    def loader(*arguments: Any, **more: Any) -> Any:
        def load(*names: Any) -> Any:
            from graftwork.federated.client_app import app

            return app

        return load

    module.install_from_fab = install
    module.get_load_client_app_fn = loader


def main() -> None:
    """Run Flower's client process."""
    os.environ["PATH"] = os.environ.pop(PATH_VARIABLE, os.environ.get("PATH", ""))
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    pin(run_clientapp)
    sys.argv[0] = "flwr-clientapp"
    flwr_clientapp()


if __name__ == "__main__":
    main()
