"""Readers of documents, one a format: bytes in, text out."""
