"""Per-sample gradient magnitudes from a batched backward: rules per call, and the session that applies them."""
