"""Speed and memory, timed only after the numbers match."""
