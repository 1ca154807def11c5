"""The command line: one module per command.

torch and the models are imported inside the commands, so that help and usage errors are quick.
"""

from rapid_llm.cli import (  # noqa: F401  (each adds its commands)
    ask,
    bench,
    demo,
    doctor,
    evaluate,
    plan,
    report,
    serve,
)
from rapid_llm.cli.app import app, main

__all__ = ["app", "main"]
