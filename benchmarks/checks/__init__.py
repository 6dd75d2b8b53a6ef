"""Comparison of the committed rows with rows that are measured again."""
