"""Data: builds the embedded default data set and prepares the real ones in their standard layouts."""
