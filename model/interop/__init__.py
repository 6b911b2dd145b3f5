"""Other libraries' names for the same weights."""
