"""The web server, which ends with an answer, and not a broken connection, what outlasts its end."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from rapid_llm.server.service import Service

_GRACE = 5  # seconds for errors to reach the clients, after which connections are closed


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which lets requests finish for a while before they are ended.

    Args:
        config: options of uvicorn; the limit of its shutdown is set here.
        service: what answers the requests.
        seconds: time in seconds that running requests get to finish.
    """

    def __init__(self, config: uvicorn.Config, service: Service, seconds: int) -> None:
        config.timeout_graceful_shutdown = seconds + _GRACE
        super().__init__(config)
        self._service, self._seconds = service, seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and close each connection once its request is answered."""
        limit = asyncio.get_running_loop().call_later(self._seconds, self._service.stop)
        try:
            await super().shutdown(sockets)
        finally:
            limit.cancel()
