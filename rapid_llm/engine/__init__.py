"""Inference engine for one sequence: model runner, attention, KV cache and session."""
