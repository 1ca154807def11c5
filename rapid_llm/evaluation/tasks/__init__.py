"""The tasks: where their items come from, how they are asked and how answers are scored."""
