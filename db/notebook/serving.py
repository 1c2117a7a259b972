"""Datasette, put together for one lab: read-only, offline, on this machine alone unless asked otherwise."""

from __future__ import annotations

import errno
import ipaddress
import json
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn
from datasette.app import Datasette
from datasette.plugins import pm

from db.errors import LabUnusableError
from db.notebook import plugin
from db.store import Store

HERE = Path(__file__).parent
SETTINGS = {
    "allow_download": False,  # of a database that is being written; `blueberry export` makes a whole copy
    "default_cache_ttl": 0,  # a runner may be writing
    "default_page_size": 50,
    "facet_time_limit_ms": 500,
    "max_returned_rows": 2000,
    "sql_time_limit_ms": 3000,
    "suggest_facets": False,  # metadata.json names the useful ones
    "truncate_cells_html": 240,
}

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Callable[[Scope], Awaitable[None]]], Awaitable[None]]


def serve(folder: Path, host: str, port: int) -> None:
    """Serves the lab in `folder` until the process is told to stop.

    Raises:
        LabUnusableError: there is no lab, its database cannot be used, or the port is taken.
    """
    database = folder.expanduser().absolute() / "lab.db"
    if not database.exists():
        raise LabUnusableError(
            f"there is no lab in {database.parent}; name one with `blueberry --lab FOLDER browse`, "
            "or begin one with `blueberry suggest` or `make demo`"
        )

    Store(database).close()  # brings an older schema up to date, and says what is wrong with a file that cannot be used
    listener = _listen(host, port)
    app = _datasette(database).app()
    if _is_loopback(host):
        app = only_local_names(app)
    else:
        sys.stderr.write(f"everyone who can reach {host} can now read this lab\n")

    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
    sys.stdout.write(f"the lab {database.parent} is at {url}  (Ctrl+C ends)\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


def only_local_names(app: App) -> App:
    """`app`, refusing requests that name another host: a web page must not reach the lab by rebinding its own name."""

    async def guarded(scope: Scope, receive: Any, send: Callable[[Scope], Awaitable[None]]) -> None:
        if scope["type"] == "http" and not _is_local_name(dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            body = b"this lab is served to this machine alone; open it as http://127.0.0.1\n"
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": body})
        else:
            await app(scope, receive, send)

    return guarded


def _datasette(database: Path) -> Any:
    if not pm.is_registered(plugin):
        pm.register(plugin, name="blueberry")

    # With rich installed, Datasette prints every page not found with all local variables, and fails on some.
    pm.get_plugin("datasette.handle_exception").rich = None
    return Datasette(
        [str(database)],
        metadata=json.loads((HERE / "metadata.json").read_text(encoding="utf-8")),
        template_dir=str(HERE / "templates"),
        static_mounts=[("notebook", str(HERE / "static"))],
        settings=SETTINGS,
    )


def _listen(host: str, port: int) -> socket.socket:
    # Taken before the server starts, so that a taken port is one clear sentence.
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            problem = f"port {port} is taken; choose another with --port (0 takes any free one)"
        else:
            problem = f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}"

        raise LabUnusableError(problem) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local_name(header: str) -> bool:
    name = header.rpartition("]")[0].removeprefix("[") if header.startswith("[") else header.partition(":")[0]
    return _is_loopback(name.lower())
