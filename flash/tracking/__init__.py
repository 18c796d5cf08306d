"""Tracking: metrics, tables and lineage of results, for Weights & Biases or as CSV files."""
