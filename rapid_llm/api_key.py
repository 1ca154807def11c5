"""The key of a server, which the server and its clients check alike."""

from __future__ import annotations

API_KEY = "RAPID_LLM_API_KEY"
"""Variable of the environment with a server's key, for the server and its clients."""

KEY_LIMIT = "printable ASCII characters, without a space at either end"
"""What a key is made of: what every client can send in a header."""


def is_key(text: str) -> bool:
    """Whether a text may be a key, see :data:`KEY_LIMIT`."""
    return bool(text) and text.isascii() and text.isprintable() and text == text.strip()
