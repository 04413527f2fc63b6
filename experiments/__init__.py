"""The experiments: scripts that measure, and the tasks that they measure on."""
