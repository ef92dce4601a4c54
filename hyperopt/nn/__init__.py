"""Building blocks of equilibrium models: orthogonal and contractive matrices, cells, the model; import by module."""
