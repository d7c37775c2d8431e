"""Processes, devices and files; nothing here knows what is trained."""
