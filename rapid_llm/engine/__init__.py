"""Inference engine: model runner, forward passes, attention, KV cache and sessions."""
