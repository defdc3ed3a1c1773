"""What `depth.py` measures: a file for each part, and what parts have in common."""
