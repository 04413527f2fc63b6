"""The tasks: where problems come from and how a prompt is written."""
