"""Run records, and the tables and pictures rendered from them."""
