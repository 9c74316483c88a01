"""How runs are doing, from their files alone: `python -m launcher.status DIR`, and the end of a sweep."""
