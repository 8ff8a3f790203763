"""The attention rule of model.py, computed faster; each equals the plain rule, by a test."""
