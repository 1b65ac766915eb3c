"""The charts of a report as Vega-Lite specs: the page draws them, and vl-convert writes the same ones as PNG."""
