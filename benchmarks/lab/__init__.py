"""The embedded lab: a seeded world with its judge, and models trained on it from scratch. No downloads."""
