"""Recorded steps beside the planned one: how they compare, as a file and as a page."""
