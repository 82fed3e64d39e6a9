"""A vLLM over a model folder, as a process of its own: started, waited for, ended. Knows nothing of requests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from ptune.errors import ConfigError

_MODULE = "vllm.entrypoints.openai.api_server"
"""Not `vllm serve`: some of its wheels, that for processors among them, have no such command."""
_ENDS_WITHIN = 30.0


@contextlib.contextmanager
def running_vllm(python: str, folder: Path, arguments: Sequence[str], start_seconds: float) -> Iterator[str]:
    """Serve a model while the block runs, and yield its URL when it answers.

    Its own output goes to ours.

    Args:
        python: of the environment that has vLLM.
        folder: the model, merged or plain.
        arguments: further ones of vLLM's.
        start_seconds: how long it may take to load.

    Raises:
        ConfigError: it cannot be started, ends, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", _MODULE, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # its packages are others
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
    except OSError as error:
        raise ConfigError(f'cannot run "{python}": {error.strerror}; --vllm-python names one that has vLLM') from error
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, start_seconds)
        yield url
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ConfigError(
                f"vLLM ended with {process.returncode} before it answered; its own words stand above. --vllm-python "
                "names a Python that has it, --vllm-arg what it is started with"
            )
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success:
                return
        time.sleep(0.5)
    raise ConfigError(f"vLLM does not answer after {seconds:g} s; give it more by --vllm-start")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started: vLLM's engine is one of its own."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDS_WITHIN)
    process.wait()
