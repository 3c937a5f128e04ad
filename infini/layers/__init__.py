"""Parts of a decoder block that are not attention."""
