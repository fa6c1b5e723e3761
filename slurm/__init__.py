"""Job scripts, and what decides whether a job comes back."""
