"""Datasets: strict image reading, folder layouts, and small real datasets that are fetched and verified."""
