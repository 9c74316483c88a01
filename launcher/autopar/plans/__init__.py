"""The plan, the narrow waist: its file, its summary, and what can be said of it without a model."""
