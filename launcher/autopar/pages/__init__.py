"""Pictures and pages of a plan."""
