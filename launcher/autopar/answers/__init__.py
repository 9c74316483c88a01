"""What is asked about a plan: how it differs from another, and what other choices would have cost."""
