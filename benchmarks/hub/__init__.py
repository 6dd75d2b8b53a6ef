"""Real models and real prompt sets, of the Hub or of local folders in the same layout."""
