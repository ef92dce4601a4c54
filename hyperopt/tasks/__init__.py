"""Tasks: each defines what one outer step and one evaluation do, with one file for each family of experiments."""
