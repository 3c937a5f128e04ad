"""The console command `infini`, and the one door to Hydra."""
