"""Step labels for your own rollouts, by Monte Carlo."""
