"""`infini perplexity`: how well models predict whole documents, by position, with and without their memory."""

from infini.cli.measure import measure


def run(arguments: list[str]) -> None:
    """Measures with Hydra overrides and prints the table."""
    measure("perplexity", arguments)
