"""Benchmarks that print a table: `python -m launcher.bench NAME key=value ...`."""
