"""Scripts that use the library as anybody would: its public names and nothing else."""
