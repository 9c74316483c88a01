"""Runs over several hosts: their processes, what they say to each other, and what becomes of a lost one."""
