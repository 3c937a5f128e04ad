"""Whole books: read one in a single stream, then write its summary and answer questions about it."""
