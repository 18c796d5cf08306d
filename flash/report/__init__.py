"""What a team looks at: the result table, figures, the HTML page, and the same in W&B."""
