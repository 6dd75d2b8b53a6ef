"""Thin command lines over `sia` and `benchmarks`."""
