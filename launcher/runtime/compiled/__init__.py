"""The compiled programs of a stage, made before the first step, and the cache that keeps them."""
