"""A page to draw pictures with, and its server: one queue for the device, limits on all that a request may ask for."""
