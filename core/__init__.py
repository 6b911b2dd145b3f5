"""The ground floor: errors, typed configs, the registry, stable hashing, logging."""
