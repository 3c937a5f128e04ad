"""What models are measured on and trained for; each task knows a model by the protocol alone."""
