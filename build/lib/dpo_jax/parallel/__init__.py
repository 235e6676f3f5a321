"""Devices: the mesh, shardings, and steps compiled for them."""
