"""Reference adapters of the systems in the core distribution."""
