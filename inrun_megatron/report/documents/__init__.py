"""The documents behind samples: where they come from, what they say, and what they have of the samples' values."""
