"""`inrun compare`: two runs side by side."""
