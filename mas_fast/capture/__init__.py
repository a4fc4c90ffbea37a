"""How per-sample gradient magnitudes are had from a batched backward: rules per call, and the session that applies them."""
