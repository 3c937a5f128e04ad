"""`infini drift`: the error of an fp32 memory after a long stream."""

from infini.cli.measure import measure


def run(arguments: list[str]) -> None:
    """Measures with Hydra overrides and prints the table."""
    measure("drift", arguments)
