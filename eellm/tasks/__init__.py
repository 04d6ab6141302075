"""What `python run.py task=...` does. Every module has `prepare(context)`, called once in the parent before ranks
start, and `run(context)`, called on every rank; the latter returns the run's final scalars."""
