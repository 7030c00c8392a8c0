"""Real input that is always at hand: nothing is downloaded."""
