"""Tasks of lm-evaluation-harness under early exit (extra `eval`): its requests answered by our heads and decoder.

Only `model` and `catalogue` import the harness, and are imported where a run asks for it.
"""
