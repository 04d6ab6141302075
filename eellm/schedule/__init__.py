"""Pipeline schedules as data: programs, their invariants, a simulator and drawings. No torch."""
