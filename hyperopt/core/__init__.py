"""Fixed points and their derivatives: usable without the rest of the project, which it does not import."""
