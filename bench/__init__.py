"""Measurements: one short file per concept (`make bench`), and a whole iteration against TRL."""
