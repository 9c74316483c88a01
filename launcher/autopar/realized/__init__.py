"""From a plan to what running it needs: shardings, signatures, messages, functions on local shards."""
