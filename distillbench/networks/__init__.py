"""Velocity networks: the architectures that teachers, students and critics of a benchmark share."""
