"""Tool calls: their definitions, prompts, grammars and parsing, for any model and framework."""
