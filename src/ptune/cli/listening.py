"""What servers have in common on the command line: settings, the log, a socket, the end."""

from __future__ import annotations

import importlib
import logging
import signal
import socket
from typing import Any

from pydantic import ValidationError

from ptune.config.mistakes import said_of
from ptune.errors import ConfigError, MissingExtraError

_LOOPBACK = ("localhost", "127.", "::1")
_KEEP_ALIVE = 75
"""Seconds that an idle connection stays: longer than clients keep theirs (httpx and openai: 5), or a request is sent
into a connection that is being closed, and lost."""
_EXTRA = ("fastapi", "httpx", "prometheus_client", "starlette", "uvicorn")


def check_extra() -> None:
    """See that what a server needs is installed.

    Raises:
        MissingExtraError: something is not.
    """
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"ptune serve needs {name}: pip install ptune[serve]") from error


def checked(settings: type[Any], **values: Any) -> Any:
    """Return settings by options; those that are None have their default.

    Raises:
        ConfigError: one is out of range; named as the option is.
    """
    try:
        return settings(**{name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        entry = error.errors()[0]
        option = "--" + str(entry["loc"][0]).replace("_", "-").removesuffix("-seconds") if entry["loc"] else "limits"
        raise ConfigError(f"{option}{said_of([entry])}") from None


def json_log(name: str) -> logging.Logger:
    """Let the log be lines of JSON, and return that of a module."""
    from ptune.serve.logs import JsonLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return logging.getLogger(name)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the address is taken, or not this machine's.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another by --host and --port"
        ) from error


def run(app: Any, listening: socket.socket, drain: int, tokens: int, log: logging.Logger, **told: Any) -> None:
    """Serve an application until SIGTERM or Ctrl-C; requests in flight have ``drain`` seconds to finish.

    Args:
        app: of ASGI.
        listening: the socket.
        drain: seconds.
        tokens: how many are set.
        log: of the command.
        told: what the log says besides.
    """
    import uvicorn

    address, number = listening.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{number}/v1"
    log.info("serving", extra={"url": url, **told, "tokens": tokens})
    if not tokens and not address.startswith(_LOOPBACK):
        log.warning("anybody who reaches this address can use the server: no tokens are set")
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=drain, timeout_keep_alive=_KEEP_ALIVE
    )
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has drained: the end is ours
    uvicorn.Server(config).run(sockets=[listening])
