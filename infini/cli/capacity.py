"""`infini capacity`: how many facts a memory holds, over what distance, beside how many it could hold."""

from infini.cli.measure import measure


def run(arguments: list[str]) -> None:
    """Measures with Hydra overrides and prints the table."""
    measure("capacity", arguments)
