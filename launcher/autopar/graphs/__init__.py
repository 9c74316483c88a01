"""What a model computes: its traced graph, cut into layers, and how much work each op is."""
