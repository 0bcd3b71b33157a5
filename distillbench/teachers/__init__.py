"""Teachers: exact velocities of mixtures, networks trained by flow matching, their ODE samples."""
