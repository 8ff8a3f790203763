"""One file per command of evaluate.py, and what these share."""
