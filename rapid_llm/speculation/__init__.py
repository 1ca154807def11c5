"""Speculative decoding: how drafts are made, and how they are judged."""
