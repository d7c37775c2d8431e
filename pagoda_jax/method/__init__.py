"""The method's mathematics: pure functions that know nothing of configs, files or devices."""
