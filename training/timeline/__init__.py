"""Where the time of one step goes: from a profiler's trace to a few spans a person can read."""
