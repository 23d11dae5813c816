"""Regions: where in a graph token-wise work begins and ends, what goes in and out, and what takes its place."""
