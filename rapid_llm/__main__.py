"""Entry point of ``python -m rapid_llm``, the same command as ``rapid-llm``."""

import sys

from rapid_llm.cli import main

sys.exit(main())
