"""Inside a stage (Alpa, section 4): each op of its layers picks a sharding, and what that takes in memory."""
