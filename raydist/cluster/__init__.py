"""Joining a Ray cluster or starting an embedded one, and submitting jobs to one."""
