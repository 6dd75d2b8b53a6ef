"""Measurement: from a profile and requested cells to rows."""
