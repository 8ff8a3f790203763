"""Preference data as it lies: where it is, what its columns mean, cleaning, safety filter."""
