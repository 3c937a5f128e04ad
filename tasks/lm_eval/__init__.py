"""lm-eval tasks that need no network; see README.md."""
