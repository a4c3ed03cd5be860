"""Our own gradient-free methods: each asks for the losses of a whole generation, and its state is plain data."""
