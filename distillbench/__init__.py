"""What every distillation method stands on.

Paths, times, networks, teachers, players, cells and the training loop.
"""
