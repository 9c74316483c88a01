"""How tensors lie on a mesh: specs, the rules of every op, resharding, crossings, collectives counted."""
