"""`inrun summary`: the answer a user came for, as figures and as printed text."""
