"""Drafters: implementations of the ``Drafter`` protocol."""
