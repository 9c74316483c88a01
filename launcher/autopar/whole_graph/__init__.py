"""`auto_shard`: one graph sharded as a whole, with its loops and branches, and run as it was priced."""
