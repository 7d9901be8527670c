"""Evaluations: settings in, scores and figures out."""
