"""Processes, files and fingerprints: how a run works on a machine."""
