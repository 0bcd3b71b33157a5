"""The ground that every distillation method stands on, and what trains, audits and tables it."""
