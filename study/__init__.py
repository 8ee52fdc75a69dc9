"""The experiment: search spaces through Optuna and Ray Tune, and what comes of them."""
