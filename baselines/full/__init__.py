"""Plain causal attention, over the whole text or a window of it."""
