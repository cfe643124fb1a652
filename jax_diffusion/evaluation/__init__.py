"""Scores of a run or of any images."""
