"""Exit thresholds with a guarantee: Learn-then-Test on held-out text, as CALM (arXiv 2207.07061) does it.

`bounds` is the statistics, `losses` what every held-out sequence loses at every threshold, `certify` makes the one into
the other's verdict, `result` is calibration.json and what decoding takes from it, `table` the terminal's view of it.
"""
