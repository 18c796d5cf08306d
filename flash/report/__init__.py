"""Report of a study: result table, figures and HTML page, also logged to W&B."""
