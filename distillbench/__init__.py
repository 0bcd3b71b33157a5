"""The ground every distillation method stands on: paths, times, networks, teachers, players, cells and the training loop."""
