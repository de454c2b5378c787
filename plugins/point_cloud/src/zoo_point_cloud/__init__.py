"""zoo_point_cloud: point clouds and 3D occupancy with state-space models."""

__version__ = "0.1.0"
