"""zoo_recommendation: sequential recommenders whose user is a state of fixed size."""

__version__ = "0.1.0"
