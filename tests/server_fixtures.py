"""Fixtures of a server of a tiny model, for the test files that import them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server, served, tiny_decoder

from rapid_llm import RapidDecoder


@pytest.fixture(scope="module", name="decoder")
def decoder_fixture() -> RapidDecoder:
    return tiny_decoder()


@pytest.fixture(scope="module", name="server")
def server_fixture(decoder: RapidDecoder) -> Iterator[Server]:
    with served(decoder) as server:
        yield server


@pytest.fixture(name="post")
def post_fixture(server: Server) -> Any:
    return server.post
