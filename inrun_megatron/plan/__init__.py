"""What scoring will cost, before a run: `inrun plan`. docs/scaling.md derives the formulas, tests/test_plan.py holds them
to measured bytes and counted collectives and operations. Needs neither torch nor a GPU."""
