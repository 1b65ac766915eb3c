"""`inrun report`: the figures of a run, and the page and PNG files that show them."""
