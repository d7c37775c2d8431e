"""What a finished generator is for."""
