"""The command line: one module a command.

torch and the models are imported inside the commands: help and refusals need not wait for them.
"""

from rapid_llm.cli import ask, bench, demo, plan  # noqa: F401  (each adds its command)
from rapid_llm.cli.app import app, main
from rapid_llm.evaluation.command import evaluate
from rapid_llm.evaluation.report_command import report

app.command("eval")(evaluate)
app.command()(report)

__all__ = ["app", "main"]
