"""What `python run.py task=...` does. Every task is a module whose `run(context)` is called on every rank and returns final
metrics; `before_ranks` says what comes first, once a machine."""
