"""Measurements side by side with PyTorch; not run by the tests."""
