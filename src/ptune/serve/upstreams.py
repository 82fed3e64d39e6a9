"""The servers behind a gateway: which are alive, which is least busy, and a request sent to one after another.

Nothing is answered twice: a request is sent to another server only as long as nobody has seen anything of its answer.
Knows no bodies and no models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from ptune.serve.metrics import GatewayMetrics
from ptune.serve.paths import MODELS
from ptune.serve.refusals import RefusedError

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0
_PROBE_SECONDS = 10.0
_PATIENCE = 3  # probes without an answer; a server under load is slow to give one
_ELSEWHERE = (429, 502, 503)  # what another server may well answer


Examine = Callable[[httpx.AsyncClient, str, str], Awaitable["str | None"]]
"""Why a server cannot have what is sent, None where it can: of a client, the server's URL, and its first model."""


@dataclass
class Upstream:
    """A server behind the gateway.

    Attributes:
        url: without the ``/v1``.
        alive: whether it answered last.
        in_flight: requests that it works on.
        models: what its ``/v1/models`` lists.
        silent: probes in a row that it did not answer in time.
        hindrance: why it gets no requests although it answers; None where it gets them.
    """

    url: str
    alive: bool = False
    in_flight: int = 0
    models: list[dict[str, Any]] = field(default_factory=list)
    silent: int = 0
    hindrance: str | None = None


class Upstreams:
    """Servers that answer alike. Belongs to the event loop."""

    def __init__(
        self, urls: list[str], metrics: GatewayMetrics, token: str | None = None, examine: Examine | None = None
    ) -> None:
        """Take URLs, what the servers want as a bearer token, and what is tried on each before it gets requests."""
        self.all = [Upstream(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self._metrics, self._examine = metrics, examine
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            trust_env=False,
        )

    @property
    def alive(self) -> list[Upstream]:
        """Those that answer, the least busy first."""
        return sorted((upstream for upstream in self.all if upstream.alive), key=lambda upstream: upstream.in_flight)

    @contextlib.asynccontextmanager
    async def watched(self, seconds: float) -> AsyncIterator[None]:
        """Look at every server now and again while the block runs."""
        await self._look()
        watch = asyncio.create_task(self._watch(seconds))
        try:
            yield
        finally:
            watch.cancel()
            await self._client.aclose()

    @contextlib.asynccontextmanager
    async def answer(
        self, path: str, body: Callable[[Upstream], dict[str, Any]], *, streamed: bool, fit: Callable[[Upstream], bool]
    ) -> AsyncIterator[httpx.Response]:
        """Send a request to the least busy server, and to another where that fails; yield the answer.

        A whole answer is read to its end before it is yielded, a streamed one to the end of its headers. Until then
        another server may be asked, and none from then on.

        Args:
            path: of the request.
            body: of the request, for the server that gets it.
            streamed: whether the answer is.
            fit: which servers may answer.

        Raises:
            RefusedError: 503, none is alive, or all failed.
            httpx.HTTPError: the stream breaks off within the block.
        """
        tried: set[int] = set()
        refused: httpx.Response | None = None
        while left := [one for one in self.alive if id(one) not in tried and fit(one)]:
            upstream = left[0]
            self._metrics.retries.inc(bool(tried))
            tried.add(id(upstream))
            upstream.in_flight += 1
            self._metrics.in_flight.inc()
            try:
                request = self._client.build_request("POST", f"{upstream.url}{path}", json=body(upstream))
                try:
                    response = await self._client.send(request, stream=True)
                    if not streamed or response.status_code != 200:
                        await response.aread()
                except httpx.TransportError as error:
                    self._lost(upstream, error)
                    continue
                try:
                    if response.status_code in _ELSEWHERE:
                        refused = response
                        continue
                    try:
                        yield response
                    except httpx.TransportError as error:
                        self._lost(upstream, error)
                        raise
                    return
                finally:
                    await response.aclose()
            finally:
                upstream.in_flight -= 1
                self._metrics.in_flight.dec()
        if refused is not None:
            yield refused
            return
        raise RefusedError(
            503, "no server behind this one answers; ask again later", code="no_upstream", headers={"Retry-After": "2"}
        )

    def _lost(self, upstream: Upstream, error: Exception) -> None:
        if upstream.alive:
            _log.warning("a server is lost", extra={"upstream": upstream.url, "reason": type(error).__name__})
        upstream.alive = False
        self._metrics.alive.set(len(self.alive))

    async def _watch(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._look()

    async def _look(self) -> None:
        await asyncio.gather(*(self._probe(upstream) for upstream in self.all))
        self._metrics.alive.set(len(self.alive))

    async def _probe(self, upstream: Upstream) -> None:
        try:
            answer = await self._client.get(f"{upstream.url}{MODELS}", timeout=_PROBE_SECONDS)
            models = answer.raise_for_status().json()["data"]
            hindrance = None
            if self._examine is not None and not upstream.alive:
                hindrance = await self._examine(self._client, upstream.url, models[0]["id"])
        except httpx.TimeoutException as error:
            upstream.silent += 1
            if upstream.silent >= _PATIENCE:
                self._lost(upstream, error)
            return
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            self._lost(upstream, error)
            return
        if hindrance is not None:
            if hindrance != upstream.hindrance:
                _log.error("a server cannot be used", extra={"upstream": upstream.url, "reason": f"it {hindrance}"})
            upstream.hindrance = hindrance
            return
        if not upstream.alive:
            _log.info("a server answers", extra={"upstream": upstream.url})
        upstream.alive, upstream.silent, upstream.models, upstream.hindrance = True, 0, models, None
