"""`infini booksum`: what models know of the books that they have read, as numbers, a table, a picture and a page to read."""

from infini.cli.measure import measure


def run(arguments: list[str]) -> None:
    """Reads books with one model or several, then writes record, table, picture and page.

    Raises:
        InputError: an override, a checkpoint, a file of books or summaries, or an output folder that cannot be used.
    """
    measure("booksum", arguments)
