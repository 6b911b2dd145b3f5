"""Every registered mechanism under every layout: as on one process."""

import pytest

from evaluation.contracts.distributed import CONTRACTS, concerns, prove, reshard
from evaluation.contracts.probe import mechanisms, probe
from evaluation.contracts.report import declared

ENTRIES = {f"{entry.slot}:{entry.name}": entry for entry in mechanisms()}


def cases(world):
    return [
        (name, label)
        for name, entry in ENTRIES.items()
        for label, contract in CONTRACTS.items()
        if contract.world == world
        and not any(declared(entry, need) for need in contract.needs)
        and concerns(label, probe(entry))
    ]


@pytest.mark.parametrize(("name", "contract"), cases(1), ids=lambda value: value)
def test_one_process(name, contract):
    prove(contract, probe(ENTRIES[name]), None)


@pytest.mark.parametrize(("name", "contract"), cases(2), ids=lambda value: value)
def test_two_processes(name, contract, ranks):
    prove(contract, probe(ENTRIES[name]), ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "contract"), cases(4), ids=lambda value: value)
def test_four_processes(name, contract, four_ranks):
    prove(contract, probe(ENTRIES[name]), four_ranks)


@pytest.mark.parametrize("name", ENTRIES)
def test_checkpoint_of_two_processes_is_read_by_one(name, ranks):
    reshard(probe(ENTRIES[name]), ranks)
