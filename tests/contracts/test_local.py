"""Every registered mechanism through every contract that one process can prove."""

import pytest

from evaluation.contracts.local import PROOFS, applies, compiled
from evaluation.contracts.probe import mechanisms, probe
from evaluation.contracts.report import declared

ENTRIES = {f"{entry.slot}:{entry.name}": entry for entry in mechanisms()}
CASES = [
    (name, contract)
    for name, entry in ENTRIES.items()
    for contract in PROOFS
    if declared(entry, contract) is None and applies(contract, probe(entry))
]


@pytest.mark.parametrize(("name", "contract"), CASES, ids=lambda value: value)
def test_contract(name, contract):
    PROOFS[contract](probe(ENTRIES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_compiles_to_machine_code(name):
    if declared(ENTRIES[name], "compile") is None:
        compiled(probe(ENTRIES[name]), backend="inductor")


def test_every_slot_has_mechanisms():
    assert {entry.slot for entry in ENTRIES.values()} >= {
        "norm", "placement", "residual", "mixer", "position", "feedforward", "activation",
    }  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_declared_impossible_has_a_reason(name):
    for contract, reason in ENTRIES[name].cannot.items():
        assert len(reason.split()) >= 4, f"{name} declares {contract} with no reason to read"
