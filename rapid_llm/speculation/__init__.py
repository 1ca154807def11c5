"""Speculative decoding: drafters, verification, draft lengths."""
