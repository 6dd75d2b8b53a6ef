"""Settings of a run: profiles and cells."""
