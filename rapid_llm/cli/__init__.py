"""The command line: one module per command.

torch and the models are imported inside the commands, so that help and usage errors are quick.
"""

# Each adds its commands, in the order of the help.
from rapid_llm.cli import ask, demo, serve, doctor, plan, bench, evaluate, report  # noqa: F401  # isort: skip
from rapid_llm.cli.app import app, main

__all__ = ["app", "main"]
