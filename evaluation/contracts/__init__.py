"""Contracts: the proofs that every registered mechanism goes through, built from the registry.

`probe` makes the small model that stands for a mechanism, `local` holds the proofs on one process,
`distributed` those on several, and `report` keeps what came out for `manyforms zoo --matrix`.
A plugin's mechanisms go through the same proofs: `manyforms zoo --check my_mixer.py`.
"""
