"""The lab: a small world with a judge, and models trained in it."""
