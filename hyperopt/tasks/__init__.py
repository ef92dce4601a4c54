"""Tasks: what one outer step and one evaluation do, one file a family; the settings are free of torch."""
