"""`infini speed`: how fast models read, write and learn, by the length of the text."""

from infini.cli.measure import measure


def run(arguments: list[str]) -> None:
    """Times with Hydra overrides and prints the table."""
    measure("speed", arguments)
