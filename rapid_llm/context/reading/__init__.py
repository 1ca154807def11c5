"""Readers of document formats: bytes in, text out."""
