"""A cluster in numbers: devices, hosts, links, meshes, and what computing and communicating cost there."""
