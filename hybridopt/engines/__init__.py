"""What runs a rule: compiled loops on the CPU."""
