"""Command-line programs: each runs with `python -m scripts.<name> --help`."""
