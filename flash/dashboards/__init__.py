"""Dashboards in Weights & Biases as code: a workspace and a report of one project."""
