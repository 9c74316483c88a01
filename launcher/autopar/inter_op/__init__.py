"""Across stages (Alpa, section 5): cut layers and cluster, and search all that stages may combine."""
