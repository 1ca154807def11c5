"""Running one model over one growing sequence: attention, KV cache, forward pass, session."""
