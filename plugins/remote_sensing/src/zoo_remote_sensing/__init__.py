"""Remote sensing in the zoo of state-space models: change, damage, scenes, spectra."""
