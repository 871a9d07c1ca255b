"""Passes over graphs, in three rooms: prepare, calibrate, lower."""
