"""Real documents: their sets, rivals of our blends, how a document is scored under all of them, and the tables."""
