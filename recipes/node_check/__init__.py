"""Checks of each node of a job before the job uses it."""
