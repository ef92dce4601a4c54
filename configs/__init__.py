"""The YAML configs, as a package so that a wheel carries them."""
