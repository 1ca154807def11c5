"""Options of the server."""

# No ``from __future__ import annotations``: the options declared in annotations are read at run
# time.

import os
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Annotated, ClassVar

from rapid_llm.api_key import API_KEY, KEY_LIMIT, is_key
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import Option, check

_WHOLE = "a whole number of at least 1"
_COUNT = "a whole number of at least 0"


@dataclass(frozen=True)
class ServerConfig:
    """Options of the server: where it listens, who may ask, and how much.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Server"

    host: Annotated[
        str,
        Option(
            "Address to listen on; the default is reached from this machine only.",
            per_call=False,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Option(
            "Port to listen on; 0 takes a free one.",
            "a whole number from 0 to 65535",
            lambda port: 0 <= port < 2**16,
            per_call=False,
        ),
    ] = 8000
    api_key: Annotated[
        str | None,
        Option(
            "Key that every request must bring as Authorization: Bearer …; by default that of "
            "RAPID_LLM_API_KEY in the environment, or none.",
            f"None or {KEY_LIMIT}",
            is_key,
            private=True,
            metavar="KEY",
            per_call=False,
        ),
    ] = field(default=None, repr=False)
    served_model_name: Annotated[
        str | None,
        Option(
            "Name of the model in requests and answers; by default the target's.",
            "None or a string of at least one character",
            bool,
            metavar="NAME",
            per_call=False,
        ),
    ] = None
    max_queue: Annotated[
        int,
        Option(
            "Requests that may wait for their turn; further ones are refused with status 429.",
            _COUNT,
            lambda n: n >= 0,
            per_call=False,
        ),
    ] = 64
    max_body_bytes: Annotated[
        int,
        Option(
            "Maximum length of a request's body, uploaded files included.",
            _WHOLE,
            lambda n: n >= 1,
            metavar="BYTES",
            per_call=False,
        ),
    ] = 64 << 20
    max_documents: Annotated[
        int,
        Option(
            "Maximum number of documents, and of chunks, of a request.",
            _WHOLE,
            lambda n: n >= 1,
            per_call=False,
        ),
    ] = 1000
    max_files_bytes: Annotated[
        int,
        Option(
            "Maximum bytes of all uploaded files' texts and names together.",
            _COUNT,
            lambda n: n >= 0,
            metavar="BYTES",
            per_call=False,
        ),
    ] = 1 << 30
    replicas: Annotated[
        int,
        Option(
            "Processes that hold the models, on Ray Serve where more than 1; each takes a GPU.",
            _WHOLE,
            lambda n: n >= 1,
            per_call=False,
        ),
    ] = 1
    shutdown_seconds: Annotated[
        int,
        Option(
            "Time in seconds that running requests get to finish after SIGTERM.",
            _COUNT,
            lambda n: n >= 0,
            metavar="SECONDS",
            per_call=False,
        ),
    ] = 30

    def __post_init__(self) -> None:
        check(self)

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    def with_key_of_environment(self) -> "ServerConfig":
        """The options, with the key of ``RAPID_LLM_API_KEY`` where they have none.

        Raises:
            InvalidParameterError: there is no key, and other machines reach the server.
        """
        made = replace(self, api_key=self.api_key or os.environ.get(API_KEY) or None)
        if not made.local and made.api_key is None:
            raise InvalidParameterError(
                f"host={made.host!r} lets other machines ask, so that a key is needed: give one as "
                f"api_key or in {API_KEY}"
            )
        return made


def is_loopback(name: str) -> bool:
    """Whether a name or address is this machine's own, which no other reaches."""
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
