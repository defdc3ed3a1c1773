"""Local training inside other people's loops."""
