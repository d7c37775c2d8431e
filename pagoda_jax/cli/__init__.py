"""One file a command of `pagoda`: its flags, one call, what it prints."""
