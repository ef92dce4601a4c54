"""The command: compose a config, check it, run it, track it, sweep it, report on it and export what it learned."""
