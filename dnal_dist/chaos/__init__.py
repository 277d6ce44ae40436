"""Kill a run at random instants, resume it each time, and compare its end with an undisturbed run's."""
