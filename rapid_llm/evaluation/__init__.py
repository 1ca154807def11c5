"""Quality and speed of every method on long-context tasks."""
