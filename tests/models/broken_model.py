"""A module of a user that cannot be imported, for test_custom.py."""

raise RuntimeError("broken on import")
