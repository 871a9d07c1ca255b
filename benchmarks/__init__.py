"""Measurements that are no part of the package; README.md says what each script answers."""
