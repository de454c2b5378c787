"""zoo_time_series: time series models of the zoo of state-space models: SpaceTime and TSM2."""

__version__ = "0.1.0"
