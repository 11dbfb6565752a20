"""Which triple stands where, and what is done to it: pure functions of (seed, epoch, place)."""
